"""The problem of a run: two losses of (x, y, batch). x and y are tensors, trees of tensors, or modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ClosureError, TensorError
from ..evaluation.vectors import Vector
from ..hypergradient.oracle import Loss, Oracle
from ..hypergradient.sample import Batch
from ..hypergradient.trees import Tree, flatten, same_structure

__all__ = ["BilevelProblem", "BoundModule", "Variable"]

LevelLoss: TypeAlias = Callable[[Tree, Tree, Batch], Tensor]


@dataclass(frozen=True)
class BilevelProblem:
    """min_x f(x, y*(x)) with y*(x) = argmin_y g(x, y).

    Both losses take (x, y, batch) and return a tensor with one real number. x and y have the form that `methods.run`
    received: a tensor, or a nesting of lists, tuples and mappings of tensors. A module becomes a function that
    calls it with the present parameters (`BoundModule`). The losses must not change x and y in place.

    Args:
        upper_loss: f(x, y, batch).
        lower_loss: g(x, y, batch).

    Raises:
        ClosureError: A loss is not callable.

    >>> problem = BilevelProblem(
    ...     upper_loss=lambda x, y, batch: ((y - 1) ** 2 / 2 + x**2 / 20).sum(),
    ...     lower_loss=lambda x, y, batch: ((y - x / 2) ** 2).sum(),
    ... )
    """

    upper_loss: LevelLoss
    lower_loss: LevelLoss

    def __post_init__(self) -> None:
        """Validate the losses."""
        for name in ("upper_loss", "lower_loss"):
            if not callable(getattr(self, name)):
                raise ClosureError(
                    f"BilevelProblem({name}={getattr(self, name)!r}): pass a function of (x, y, batch) returning a loss"
                )

    def oracle(self, x: Variable, y: Variable) -> Oracle:
        """Return the counted oracles of the problem, for x and y arranged in these ways."""

        def arranged(loss: LevelLoss) -> Loss:
            return lambda upper, lower, batch: loss(x.arrange(upper), y.arrange(lower), batch)

        return Oracle(arranged(self.upper_loss), arranged(self.lower_loss))


@dataclass(frozen=True)
class BoundModule:
    """A module with given parameters. It is called like the module, through `torch.func.functional_call`.

    Buffers are copies, so that no evaluation changes the module. BatchNorm in training mode normalises by the batch and
    keeps its running statistics.

    Attributes:
        module: The module.
        parameters: Its trainable parameters by name.

    >>> module = nn.Linear(1, 1, bias=False)
    >>> float(BoundModule(module, {"weight": torch.tensor([[3.0]])})(torch.ones(1)))
    3.0
    """

    module: nn.Module
    parameters: dict[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the parameters."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        return functional_call(self.module, {**self.parameters, **buffers}, args, kwargs)


class Variable:
    """How a variable is arranged: from what the user gave to a flat tuple of tensors, and back.

    Args:
        given: A tensor, a nesting of them, or a module.
        name: "x" or "y", for messages.

    Attributes:
        tensors: Copies of the tensors that were given, detached.

    Raises:
        TensorError: There is no tensor, or one that cannot be stepped.
    """

    def __init__(self, given: Tree, name: str) -> None:
        self._module = given if isinstance(given, nn.Module) else None
        if self._module is not None:
            given = {key: p for key, p in self._module.named_parameters() if p.requires_grad}
        leaves, self._structure = flatten(given, name)
        if not leaves:
            raise TensorError(f"{name} holds no tensor (of a module, only trainable parameters count): nothing to step")
        for index, leaf in enumerate(leaves):
            if leaf.layout is not torch.strided or not leaf.is_floating_point():
                kind = leaf.dtype if leaf.layout is torch.strided else leaf.layout
                raise TensorError(f"{name}, tensor {index} is {kind}: only dense real floating tensors can be stepped")
        self.tensors: Vector = tuple(leaf.detach().clone() for leaf in leaves)

    def arrange(self, tensors: Vector) -> Tree:
        """Return the tensors as the losses expect them."""
        return self.tree(tensors) if self._module is None else BoundModule(self._module, self.tree(tensors))

    def tree(self, tensors: Vector) -> Tree:
        """Return the tensors arranged as they were given; those of a module by name."""
        return same_structure(self._structure, tensors)
