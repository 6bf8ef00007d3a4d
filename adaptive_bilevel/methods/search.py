"""The upper search of a row: `BiSLS` or `OneStepBiSLS`, stepping on copies of the driver's variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bilevel import BiSLS, OneStepBiSLS
from ..bilevel.lower import LowerProblem
from ..evaluation import foreach
from ..evaluation.guard import Closure, Guard
from ..evaluation.objective import Evaluated, Objective
from ..evaluation.vectors import Vector
from ..hypergradient.estimate import Estimate, Point
from ..hypergradient.lanczos import Lanczos
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..hypergradient.shared_basis import leave
from ..policies import SLS, Record
from .checks import SEARCHES
from .directions import Adam
from .row import Row
from .state import PlainData

__all__ = ["Searched", "UpperSearch"]


class Searched(NamedTuple):
    """What an upper search did.

    Attributes:
        x: x after the step.
        y: y after it: moved along, or as before.
        record: Why.
    """

    x: Vector
    y: Vector
    record: Record


class UpperSearch:
    """The search of a row, on a hypergradient whose parts have been computed.

    Args:
        row: The row; its `upper_step` is a search.
        oracle: Counts what the search evaluates.
        point: Gives the shapes.
    """

    def __init__(self, row: Row, oracle: Oracle, point: Point) -> None:
        self._oracle = oracle
        self._x = [t.detach().clone().requires_grad_() for t in point.x]
        self._level = _Level(point.y)
        self._optimizer = _optimizer(row, self._x, self._level)
        self._optimizer.evaluations = oracle.evaluations

    def go(self, point: Point, estimate: Estimate, sample: Sample, lower_step: float) -> Searched:
        """Search from this point along the estimate.

        Args:
            point: Where.
            estimate: The hypergradient there.
            sample: Its sample.
            lower_step: Step size of the last lower step, for response="step".
        """
        x, y = self._x, self._level.leaves
        self._level.step_size = lower_step
        with torch.no_grad():
            foreach.copy_([*x, *y], [*point.x, *point.y])
        for p, h in zip(x, estimate.hypergradient, strict=True):
            p.grad = h
        solver = self._optimizer.solver if isinstance(self._optimizer, BiSLS) else None
        if estimate.inverse is not None and isinstance(solver, Lanczos):
            leave(y, solver, estimate.inverse, None)
        self._optimizer.step(
            _Estimated(self._oracle, x, y, sample, estimate),
            lambda: self._oracle.lower_loss(tuple(x), tuple(y), sample),
        )
        record = self._optimizer.record
        assert record is not None
        after_x, after_y = (tuple(t.detach().clone() for t in leaves) for leaves in (x, y))
        return Searched(after_x, after_y, record)

    def state_dict(self) -> PlainData:
        """Return the optimizer's state."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: PlainData) -> None:
        """Load it."""
        self._optimizer.load_state_dict(state)


def _optimizer(row: Row, x: Sequence[Tensor], level: _Level) -> BiSLS | OneStepBiSLS:
    """Return the optimizer that a row describes."""
    policy, along = row.upper_step, row.upper_direction
    assert isinstance(policy, SEARCHES)
    lr = policy.start if isinstance(policy, SLS) else policy.bound
    shared: dict[str, Any] = {"lower": level, "project": row.project}
    if isinstance(along, Adam):
        shared |= {"direction": "adam", "betas": along.betas, "eps": along.eps}
    if row.response == "step":
        names = ("c", "shrink", "grow", "reset", "slack", "lower_bound", "max_trials", "decay")
        shared |= {name: getattr(policy, name) for name in names if hasattr(policy, name)}
        return OneStepBiSLS(x, lr, **shared, **row.given("momentum", "baseline", "response_steps"))
    shared |= row.given("momentum", "curvature", "carry")
    if "x" not in row.groups:  # y moves together with x, and there is no next lower step to take a prediction back
        shared["carry"] = False
    return BiSLS(x, lr, solver=row.response_solver(), search=policy, **shared)


class _Estimated(Objective):
    """The upper loss of a row on a sample, with the partial gradients that the estimate took."""

    def __init__(
        self, oracle: Oracle, x: Sequence[Tensor], y: Sequence[Tensor], sample: Sample, estimate: Estimate
    ) -> None:
        self._oracle, self._x, self._y, self._sample, self._estimate = oracle, x, y, sample, estimate

    def __call__(self) -> Tensor:
        return self._oracle.upper_loss(tuple(self._x), tuple(self._y), self._sample)

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated | None:
        """Return the estimate's."""
        partials = self._estimate.partials
        return None if partials is None else Evaluated(self._estimate.loss, [*partials.upper, *partials.lower])


class _Level:
    """The driver's lower variable in the place of lower optimizers."""

    def __init__(self, y: Vector) -> None:
        self.leaves = [t.detach().clone().requires_grad_() for t in y]
        self.step_size = 0.0

    limit = math.inf  # the driver's steps are rules of this package, or as the paper has them

    def tensors(self) -> list[Tensor]:
        """Return the lower variable."""
        return self.leaves

    def problems(self, closures: Closure, guard: Guard) -> list[LowerProblem]:
        """Return the problem of the driver's lower closure."""
        return [LowerProblem(self.leaves, closures, guard.random_state(), self.step_size)]

    def upper_moved(self) -> None:
        """Do nothing: the driver has no lower optimizer."""

    restart = upper_moved

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        """Move the lower variable along."""
        foreach.add_(self.leaves, response, alpha=step)
