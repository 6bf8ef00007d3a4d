"""The upper search of a row: `BiSLS`, stepping on copies of the driver's variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bilevel import BiSLS
from ..bilevel.lower import LowerLevel
from ..evaluation.guard import Closure, Guard
from ..evaluation.vectors import Vector
from ..hypergradient.estimate import Estimate, Point
from ..hypergradient.oracle import Oracle, Sample
from ..optim.base import Sample as ReplayedSample
from ..optim.options import placeholder
from ..policies import SLS, SLSB, Record
from .directions import Adam
from .row import Row

__all__ = ["Searched", "UpperSearch"]


class Searched(NamedTuple):
    """What an upper search did.

    Attributes:
        x: x after the step.
        y: y after it: carried along, or as before.
        offered: Where y was before it was carried by choice; None: there is no choice to make.
        record: Why.
    """

    x: Vector
    y: Vector
    offered: Vector | None
    record: Record


class UpperSearch(BiSLS):
    """`BiSLS` with the policy of a row, on a hypergradient whose parts are known already.

    Args:
        row: The row; its `upper_step` is a search.
        oracle: Counts what the search evaluates.
        point: Gives the shapes.
        carry: Whether y moves along.
    """

    def __init__(self, row: Row, oracle: Oracle, point: Point, *, carry: str | bool) -> None:
        policy = row.upper_step
        self._given_policy = policy
        self._oracle = oracle
        self._level = _Level(point.y)
        self._partial_gradients: tuple[Tensor, list[Tensor | None]] | None = None
        names = ("c", "shrink", "grow", "reset", "slack", "lower_bound", "max_trials", "max_step")
        direction: dict[str, Any] = {}
        if isinstance(row.upper_direction, Adam):
            direction = {"direction": "adam", "betas": row.upper_direction.betas, "eps": row.upper_direction.eps}
        super().__init__(
            [t.detach().clone().requires_grad_() for t in point.x],
            policy.start if isinstance(policy, SLS) else policy.bound,
            response=row.response,
            response_steps=row.response_steps,
            baseline=row.baseline,
            solver=row.response_solver(),
            carry=carry,
            curvature=row.curvature,
            momentum=row.momentum,
            project=row.project,
            **{name: getattr(policy, name) for name in names if hasattr(policy, name)},
            **direction,
        )
        self.evaluations = oracle.evaluations

    def bind(self, lower: Any) -> None:
        """Set the lower level: the driver's."""
        super().bind(None)
        self.lower = self._level

    def _make_policy(self, rule: SLS) -> Any:
        if isinstance(self._given_policy, SLSB):  # BiSLS itself has no decaying bound
            low = None if self.parts.response == "step" else rule.lower_bound
            return dataclasses.replace(self._given_policy, bound=placeholder(low), lower_bound=low)
        return super()._make_policy(rule)

    def _partials(
        self, guard: Guard, upper_closure: Closure, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        return self._partial_gradients or super()._partials(guard, upper_closure, tensors)

    def go(self, point: Point, estimate: Estimate, sample: Sample, lower_step: float) -> Searched:
        """Search from this point along the estimate.

        Args:
            point: Where.
            estimate: The hypergradient there.
            sample: Its sample.
            lower_step: Step size of the last lower step, for response="step".
        """
        x, y = self._parameters(), self._level.leaves
        self._level.step_size, self._level.offset = lower_step, None
        with torch.no_grad():
            torch._foreach_copy_([*x, *y], [*point.x, *point.y])
        for p, h in zip(x, estimate.hypergradient, strict=True):
            p.grad = h
        partials = estimate.partials
        self._partial_gradients = None
        if partials is not None:
            self._partial_gradients = estimate.loss, [*partials.upper, *partials.lower]
        self.step(
            lambda: self._oracle.upper_loss(tuple(x), tuple(y), sample),
            lambda: self._oracle.lower_loss(tuple(x), tuple(y), sample),
        )
        assert self.record is not None
        after = tuple(t.detach().clone() for t in y)
        offered = None
        if self._level.offset is not None:
            offered, after = point.y, tuple(torch._foreach_add(list(point.y), list(self._level.offset)))
        return Searched(tuple(t.detach().clone() for t in x), after, offered, self.record)


class _Level(LowerLevel):
    """The driver's lower variable in the place of lower optimizers."""

    def __init__(self, y: Vector) -> None:
        self.leaves = [t.detach().clone().requires_grad_() for t in y]
        super().__init__(None, [])
        self.step_size = 0.0
        self.offset: Sequence[Tensor] | None = None

    def __bool__(self) -> bool:
        return True

    def tensors(self) -> list[Tensor]:
        """Return the lower variable."""
        return self.leaves

    def samples(self, closures: Any, guard: Guard) -> list[ReplayedSample]:
        """Return the sample of the driver's lower closure."""
        return [ReplayedSample(closures, guard.random_state(), self.step_size)]

    @property
    def takes_offers(self) -> bool:
        """The driver decides about predictions."""
        return True

    def predict(self, offsets: Sequence[Tensor]) -> None:
        """Take note of the predicted response."""
        self.offset = list(offsets)
