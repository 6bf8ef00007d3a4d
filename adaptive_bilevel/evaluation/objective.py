"""A loss as a step sees it: a closure, or an object that adds what its owner has evaluated already."""

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
        gradients: One for each tensor that was asked for; None where there is none.
    """

    loss: Tensor
    gradients: list[Tensor | None]


class Objective(abc.ABC):
    """A closure of a host's, the extension point for code that evaluates losses itself.

    Pass it wherever a step takes a closure. Called, it returns the loss at the parameters as they are, on the same
    sample each time. The other members have defaults, which are those of a plain closure.

    Attributes:
        project: The convex set that the host keeps the parameters in (moves a list of tensors in place); None: none.
        rescaled: Whether the host changes the length of gradients (clipping), so that they are not those of the loss.
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
        """Return loss and gradients where the step begins, if the host has them; the step then does not take them.

        Args:
            tensors: What the gradients are wanted for.
        """
        return None

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients as the host would step along them: clipped, or changed by a hook of its own.

        Args:
            tensors: The parameters.
            gradients: Their gradients at a point that the host did not evaluate.
        """
        return list(gradients)


class Replay(NamedTuple):
    """An evaluation that can be repeated: the last sample of an optimizer, for the level above.

    Attributes:
        closure: The closure.
        random: Random state before it was evaluated.
        step_size: The step that was taken on it.
    """

    closure: Any
    random: RandomState
    step_size: float
