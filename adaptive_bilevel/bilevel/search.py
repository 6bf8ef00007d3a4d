"""The upper search: a step along a path that decreases f enough, with y answering, and passes the model check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..evaluation.attempts import Attempts
from ..hypergradient.solution import HessianReport
from ..optim.projection import Section
from ..optim.search_path import SearchPath
from ..optim.slope_rounding import most_ratio
from ..optim.state import RoleState
from ..policies import Context, Outcome, Record
from ..policies.armijo import armijo_threshold
from . import stiffness
from .context import Point
from .roles import ResponseModel, StepCheck
from .secant import Lead, Seen
from .share import Share

__all__ = ["Answer", "Found", "Limits", "nothing_to_search", "search"]


_BLIND = (
    "the hypergradient is of entries of the upper variable that neither the upper loss nor the last lower sample "
    "depends on, so nothing moved. The last lower step was on another sample: compute the hypergradient on the sample "
    "of the last lower step, or pass that of the hypergradient as step(..., lower_closure=...)"
)


class Limits(NamedTuple):
    """What an upper search may try.

    Attributes:
        policy: The search policy of this step.
        state: Its state.
        bound: The first trial of a first search (`SLS`) or the bound (`SLSB`); None: found by the policy.
        scale: Factor of one that the policy found by itself.
        most: No trial is above it.
        rounding: Relative rounding unit of f.
        onward: By how much f still falls along the last searched step, see `last_step`; None: not known.
        baseline: Whether values are compared with phi(0), and not with f(x, y).
    """

    policy: Any
    state: Any
    bound: float | None
    scale: float
    most: float
    rounding: float
    onward: float | None = None
    baseline: bool = False

    def calmed(self, state: RoleState) -> Limits:
        """Return limits under which no step is longer than a stiff lower problem allows, see `stiffness`."""
        return self._replace(most=min(self.most, stiffness.limit(state)))

    def led(self, point: Point, lead: Lead | None, section: Section | None) -> tuple[Lead, Limits] | None:
        """Return a lead whose path stays in the convex set, and the limits of a search from its first trial.

        Return None if the set leaves less than half of its slope: such a path need not descend at all.
        """
        if lead is None:
            return None
        policy = dataclasses.replace(self.policy, reset="keep")
        limits = self._replace(policy=policy, state=self.state._replace(previous=lead.start))
        path = lead.path if section is None else limits.within(point, lead.path, section)
        return (lead._replace(path=path), limits) if path.keeps(lead.path) else None

    def within(self, point: Point, path: SearchPath, section: Section) -> SearchPath:
        """Return the path that stays in the convex set up to the first trial."""
        longest = self.policy.first_trial(
            self.state,
            loss=point.value,
            slope=path.promised,
            bound=self.bound,
            scale=self.scale,
            most_ratio=most_ratio(point.value, path.promised, path.gradient.tensors, path.along),
        )
        if math.isfinite(longest) and longest > 0.0:
            return path.within(point.params, section, longest)
        return path

    def keep(self, path: SearchPath, value: float, step: float) -> Found:
        """Return a step along the path that is not searched.

        Args:
            path: The path.
            value: f(x, y).
            step: Its length, as long as no bound is shorter.
        """
        given = {"bound": self.bound, "scale": self.scale, "most": self.most, "onward": self.onward}
        cap = min(path.longest, self.policy.cap(self.state, **given))
        step = min(step, cap)
        record = Record(step, step, cap, Outcome.kept, slope=path.promised)
        after = self.policy.kept(self.state, value, path.promised, step) if record.moved else self.state
        return Found(record, path, after)


class Answer(NamedTuple):
    """What is left of a response after its search.

    Attributes:
        offsets: w, see `ResponseModel`.
        comparable: See `ResponseModel`.
        state: The response's state after the step.
        hessian: What the response's solve has shown of the lower Hessian; None: not known.
        curvature: <w, C^T d> / <w, w>; NaN: not known.
        share: The result of `Prediction.observe`.
    """

    offsets: Sequence[Tensor] | None = None
    comparable: bool = False
    state: RoleState = RoleState()
    hessian: HessianReport | None = None
    curvature: float = math.nan
    share: Share | None = None

    @classmethod
    def of(cls, model: ResponseModel, state: RoleState, share: Share | None) -> Answer:
        """Return what is left of a model; what it does not have is not known."""
        hessian, curvature = getattr(model, "hessian", None), getattr(model, "curvature", math.nan)
        return cls(model.offsets, model.comparable, state, hessian, curvature, share)


class Found(NamedTuple):
    """What an upper step found.

    Attributes:
        record: Its record.
        path: The path of the step.
        state: The policy's state after it.
        answer: Of y; None if there was no search.
        seen: Of f and h in the steps so far; None if it was not looked at.
    """

    record: Record
    path: SearchPath
    state: Any
    answer: Answer | None = None
    seen: Seen | None = None


def nothing_to_search(point: Point, path: SearchPath) -> Record | None:
    """Return the record of a step without a trial, or None if there is a search."""
    promised = path.promised
    if path.cut and abs(promised) * path.longest <= max(point.rounding * abs(point.value), path.rounding):
        # The set leaves nothing of the path, or less than f could tell.
        return Record(0.0, 0.0, math.inf, Outcome.zero_gradient, slope=promised)
    if not (math.isfinite(point.value) and math.isfinite(promised)):
        return Record(0.0, 0.0, math.inf, Outcome.non_finite, slope=promised)
    if promised <= 0.0:
        # Negative only for directions of others (a momentum): the next one may descend, since memory goes on.
        outcome = Outcome.zero_gradient if promised == 0.0 else Outcome.no_descent
        return Record(0.0, 0.0, math.inf, outcome, slope=promised)
    if point.lr == 0.0:
        return Record(0.0, 0.0, 0.0, Outcome.at_bound, slope=promised)
    return None


def search(point: Point, model: ResponseModel, check: StepCheck, limits: Limits) -> tuple[Record, Any]:
    """Return the record of a search along the model's path, and the policy's state after it."""
    guard, path, policy = point.guard, model.path, limits.policy
    value, there, attempts = point.value, math.nan, Attempts()

    def place(step: float) -> None:
        guard.put_back()
        path.go(step)
        model.answer(step)

    def evaluate(step: float) -> Tensor | float:
        place(step)
        point.counts.upper.values += 1
        return guard.value(point.objective, guard.entry)

    def trial(step: float) -> float:
        nonlocal there
        there = float(attempts.value(lambda: evaluate(step)))
        return there

    def certify(step: float) -> bool:
        asked = armijo_threshold(value, model.slope, step, c=policy.c, slack=policy.slack, rounding=limits.rounding)
        return attempts.holds(lambda: check(step, asked - there, model, place))

    guard.copy()
    if limits.baseline:
        value = there = float(evaluate(0.0))
    # Where the slope is not that of the searched function, a loss that stays the same says nothing of the closure.
    moved = path.gradient.tensors if model.comparable else []
    trials = point.closure_checks.watch(trial, value, model.slope, limits.rounding or point.rounding, moved, path.along)
    context = Context(
        value,
        model.slope,
        trials,
        bound=limits.bound,
        scale=limits.scale,
        cap=min(limits.most, path.longest),
        rounding=limits.rounding,
        certify=certify,
        most_ratio=most_ratio(value, model.slope, path.gradient.tensors, path.along),
        onward=limits.onward,
    )
    record, state = policy.propose(limits.state, context)
    attempts.conclude(record.moved)

    def look() -> float:
        guard.put_back()
        point.counts.upper.values += 1
        return float(guard.value(point.objective, guard.entry))

    record, state = trials.conclude(record, state, limits.state, look, compared=point.value)
    if getattr(model, "blind", False):
        record = record._replace(outcome=Outcome.no_descent)
        point.closure_checks.say("blind", _BLIND)
    return record._replace(slope=model.slope, slope_ratio=model.slope_ratio), state
