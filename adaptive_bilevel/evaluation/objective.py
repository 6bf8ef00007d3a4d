"""Losses of hosts: a closure that also gives gradients which the host has evaluated."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .guard import RandomState

__all__ = ["Evaluated", "Objective", "Replay"]


class Evaluated(NamedTuple):
    """A loss and its gradients at one point.

    Attributes:
        loss: The loss, detached.
        gradients: One gradient, or None, for each requested tensor.
    """

    loss: Tensor
    gradients: list[Tensor | None]


class Objective(abc.ABC):
    """The closure of a host that evaluates losses itself.

    Pass it in place of a closure. A call returns the loss at the present parameters, on the same sample each time. The
    other members default to those of a plain closure.

    Attributes:
        project: The convex set of the parameters (a callable that moves a list of tensors in place), or None.
        rescaled: Whether the host changes the length of gradients (clipping), so that they are not those of the loss.

    >>> import torch
    >>> from adaptive_bilevel import SLS
    >>> class Counted(Objective):
    ...     def __init__(self, loss):
    ...         self.loss, self.calls = loss, 0
    ...     def __call__(self):
    ...         self.calls += 1
    ...         return self.loss()
    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> objective = Counted(lambda: (x**2).sum())
    >>> _ = SLS([x], lr=0.25).step(objective)
    >>> objective.calls, x
    (2, tensor([0.5000], requires_grad=True))
    """

    project: Any = None
    rescaled: bool = False

    @property
    def source(self) -> Any:
        """The user's closure, or the batches that the loss is of: a new kind or size of them is a new sample."""
        return None

    @abc.abstractmethod
    def __call__(self) -> Any:
        """Return the loss at the parameters as they are; attached to its graph where gradients are enabled."""

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated | None:
        """Return the loss and the gradients at the start of the step if the host has them, else None.

        Args:
            tensors: Tensors of the gradients.
        """
        return None

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients after the host's changes, for example clipping or a hook.

        Args:
            tensors: The parameters.
            gradients: Their gradients at another point.
        """
        return list(gradients)


class Replay(NamedTuple):
    """The last sample of an optimizer, which the level above can evaluate again.

    Attributes:
        closure: The closure.
        random: Random state before its evaluation.
        step_size: The step on this sample.
    """

    closure: Any
    random: RandomState
    step_size: float
