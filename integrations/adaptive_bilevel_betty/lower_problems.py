"""The problems that one looks ahead into, as the lower level of its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from adaptive_bilevel.bilevel import LowerLevel, LowerProblem
from adaptive_bilevel.errors import LowerLevelError
from adaptive_bilevel.evaluation.guard import Closure, Guard
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from .bound_problem import BoundProblem
from .graph import edges
from .hypergradient import TYPE
from .release import variable
from .total_derivative import total_loss

__all__ = ["LowerProblems"]


@final
class LowerProblems:
    """The problems below one, on their last batches; with several of them, each has an inverse of its own.

    Args:
        upper: The problem.
    """

    def __init__(self, upper: BoundProblem) -> None:
        answers = edges(upper.problem)
        places = {upper.problem: -1, **{problem: i for i, problem in enumerate(answers)}}
        self._below = [(BoundProblem.of(problem), [places[u] for u in uppers]) for problem, uppers in answers.items()]
        self._rolled_back = upper.rolled_back

    def __reduce__(self) -> tuple[type[LowerLevel], tuple[list[torch.optim.Optimizer]]]:
        """Return what a copy holds: the optimizers below, which are bound to no problem."""
        return LowerLevel, (self._optimizers(),)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [below.problem.optimizer for below, _ in self._below]

    def tensors(self) -> list[Tensor]:
        """Return the lower variable: every trainable parameter of the optimizers below, once."""
        found = {id(p): p for below, _ in self._below for p in variable(below.problem) if p.requires_grad}
        return list(found.values())

    def problems(self, closures: object, guard: Guard) -> list[LowerProblem]:
        """Return the lower problems on what Betty has evaluated last, or on closures of the user's own step.

        Raises:
            LowerLevelError: One has been frozen since `bind`.
        """
        if closures is not None:
            return LowerLevel(self._optimizers()).problems(closures, guard)
        several = len(self._below) > 1
        return [_lower_problem(below, guard, answers if several else None) for below, answers in self._below]

    @property
    def limit(self) -> float | None:
        """See `LowerLevel.limit`."""
        return LowerLevel(self._optimizers()).limit

    def restart(self) -> None:
        """Clear the state of stock optimizers that does not fit an earlier point."""
        LowerLevel(self._optimizers()).restart()

    def upper_moved(self) -> None:
        """Tell the optimizers of this package, see `AdaptiveOptimizer.upper_moved`."""
        for below, _ in self._below:
            if isinstance(below.problem.optimizer, AdaptiveOptimizer):
                below.problem.optimizer.upper_moved()

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        """Move the lower variable by step * response, and project it."""
        if self._rolled_back:
            return
        torch._foreach_add_(self.tensors(), list(response), alpha=step)
        for below, _ in self._below:
            if below.callback.projects:
                below.callback.project(variable(below.problem))
            if isinstance(below.problem.optimizer, AdaptiveOptimizer):
                below.problem.optimizer.displaced()


def _lower_problem(below: BoundProblem, guard: Guard, answers: Sequence[int] | None) -> LowerProblem:
    optimizer = below.problem.optimizer
    tensors = [p for p in variable(below.problem) if p.requires_grad]
    if answers is not None and not tensors:
        raise LowerLevelError(f"problem {below.problem.name!r} is frozen: take it out of the engine's dependencies")
    sample = optimizer.sample if isinstance(optimizer, AdaptiveOptimizer) else None
    step = float(optimizer.param_groups[0]["lr"]) if sample is None else sample.step_size
    return LowerProblem(tensors, _closure(below), guard.entry, step, answers)


def _closure(below: BoundProblem) -> Closure:
    """Return the loss whose minimizer is followed; problems further below answer if they do in the hypergradient."""
    if below.problem.config.type != TYPE or not below.problem.paths:
        return below.log.replay
    return lambda: total_loss(below) if torch.is_grad_enabled() else below.log.replay()
