"""One lower problem: the steps on it inside ``solve()``, and its solution as an upper step takes it.

TorchOpt's implicit solvers run the user's loop without a graph and then put new tensors, attached to the graph of the
hypergradient, in the place of the parameters. So a lower step is an optimizer of the core that goes on with the present
tensors at the beginning of each loop, and again, cut from the graph, in the upper step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from adaptive_bilevel.errors import ClosureError, LowerLevelError
from adaptive_bilevel.evaluation.guard import Closure
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.polyak_step import PolyakOptimizer

from .optimality import local_objective
from .rules import Recipe
from .staleness import StalenessCheck

__all__ = ["SolvedProblem", "Task", "scalar"]

_MARK = "; if solve() itself changes them after its last step (a projection, say), end it with mark()"


@final
class Task:
    """One lower problem: its parameters, the optimizer that steps on them, and whether its solution still holds.

    Args:
        recipe: The optimizer, before there are tensors.

    Attributes:
        optimizer: The optimizer; None before the first loop.
        staleness: Whether anything has changed since the loop.
        clocked: Whether a `BiSPS` above counts the iterations that the bound follows.
    """

    def __init__(self, recipe: Recipe[AdaptiveOptimizer]) -> None:
        self._recipe = recipe
        self._saved: StateDict | None = None
        self.staleness = StalenessCheck()
        self.optimizer: AdaptiveOptimizer | None = None
        self.clocked = False

    def step_on(self, params: Sequence[Tensor]) -> AdaptiveOptimizer:
        """Step on these leaves from now on, and return the optimizer."""
        if self.optimizer is None:
            self.optimizer = self._recipe.make(list(params))
            if self._saved is not None:
                self.optimizer.load_state_dict(self._saved)
                self._saved = None
            if self.clocked and isinstance(self.optimizer, PolyakOptimizer):
                self.optimizer.set_clock(max(self.optimizer.clock, 0))
        else:
            self.optimizer.replace_parameters(params)
        return self.optimizer

    def step(self, closure: Closure, options: Mapping[str, object]) -> Tensor:
        """Take a step, and the parameters after it as the solution; return the loss before it.

        Args:
            closure: Returns the objective.
            options: What the rule's own step takes.
        """
        assert self.optimizer is not None
        loss = cast("Callable[..., Tensor]", self.optimizer.step)(closure, **options)
        self.take_solution()
        return loss

    def params(self) -> list[Tensor]:
        """Return the leaves."""
        return [] if self.optimizer is None else [p for g in self.optimizer.param_groups for p in g["params"]]

    def take_solution(self) -> None:
        """Take the present parameters as the solution."""
        self.staleness.take(self.params())

    def check(self, who: str, solution: Sequence[Tensor]) -> None:
        """Reject a solution that TorchOpt's backward would not be taken at.

        Raises:
            LowerLevelError: There was no step.
            HypergradientError: Upper or lower tensors were changed since the loop.
        """
        if not self.staleness.check(who, solution, _MARK):
            raise LowerLevelError(f"{who}: no lower step was taken in solve(); call the function that attach() returns")

    def state_dict(self) -> StateDict:
        """Return the optimizer's state."""
        if self.optimizer is not None:
            return self.optimizer.state_dict()
        return self._saved or {}

    def load_state_dict(self, state: StateDict) -> None:
        """Load it, now or when the optimizer is made."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)
        else:
            self._saved = state or None


@final
@dataclass
class SolvedProblem:
    """One lower problem of an upper step.

    Attributes:
        tensors: The solution, attached to TorchOpt's graph until `cut`.
        staleness: What holds of it and of the solutions before it.
        task: The lower steps that were taken; None: the module keeps its own loop.
        closure: Returns the lower objective or the optimality function's value; None: that of the last lower step.
        optimizer: Of the core or a stock one, with the solution as its parameters; None before `cut`.
    """

    tensors: list[Tensor]
    staleness: StalenessCheck
    task: Task | None = None
    closure: Closure | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def objective(self) -> Closure | None:
        """The lower closure of the response; for a module with its own loop also from an optimality function."""
        if self.task is None and self.closure is not None:
            return local_objective(self.closure, self.tensors)
        return self.closure

    def cut(self) -> torch.optim.Optimizer:
        """Cut the solution from TorchOpt's graph, and return the optimizer that has it as its parameters."""
        for p in self.tensors:
            p.detach_().requires_grad_()
        if self.task is not None:
            self.optimizer = self.task.step_on(self.tensors)
        else:
            self.optimizer = torch.optim.SGD(self.tensors, lr=1.0)  # holds the tensors, and never steps
        return self.optimizer


def scalar(closure: Closure) -> Closure:
    """Return the closure, checked to return what TorchOpt differentiates."""
    if not callable(closure):
        raise ClosureError(f"step(closure={closure!r}): pass a function, e.g. step(lambda: self.objective(batch))")

    def checked() -> object:
        loss = closure()
        if isinstance(loss, Tensor) and loss.dim() > 0:
            raise ClosureError(
                f"the objective has shape {tuple(loss.shape)}; TorchOpt differentiates scalars without a dimension "
                "only, so return e.g. loss.mean() or loss.reshape(())"
            )
        return loss

    return checked
