"""What earlier searches have shown of the right step length, and whether that is enough to know it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from ..policies import Outcome, Record, SearchState
from ..policies.armijo import parabola_minimizer

__all__ = ["Scale", "visible"]

_MOST_GROWTH = math.log(1e6)
"""Logarithm of the most that kept steps let a search start longer by."""


def visible(promised: float, value: float, rounding: float) -> bool:
    """Return whether a decrease is more than the rounding of f."""
    return promised > rounding * abs(value)


class Scale(NamedTuple):
    """What earlier searches have shown of the right step length.

    Attributes:
        state: The policy's state.
        rejected: Whether a trial was ever rejected, so that it is known what is too long.
        shortest: The shortest trial that the last search with a rejection has rejected; inf if that search failed; 0 if
            that is outgrown, see `policy`.
        kept: Number of steps since the last search whose length was kept.
        ratio: Size of the searched slope over <h, d>, in the last search that moved. Far from 1 if h was scaled.
        excused: Whether the step of the last search passed the model check by an excuse, see `TangentCheck`.
    """

    state: SearchState
    rejected: bool
    shortest: float = math.inf
    kept: int = 0
    ratio: float = 1.0
    excused: bool = False

    @property
    def previous(self) -> float:
        """The last accepted step; 0 before there was one."""
        return self.state.previous

    @property
    def resumed(self) -> bool:
        """Whether the next search starts from a step that was accepted before."""
        return self.previous > 0.0

    def policy(self, policy: Any) -> Any:
        """Return the search policy, as it is until its first steps have shown the scale.

        The first search takes no step beyond the minimizer of its own quadratic model, which is Armijo's test with
        c = 1/2 (or above): Adam's first direction has entries of size 1 all over and no scale; where x saturates
        (weights behind a sigmoid), what one step too long did is not undone by the next. And until a trial has been
        rejected, nothing is known of what is too long, so searches start at 1 / shrink times the last step at least. So
        they do where steps have outgrown what was rejected by the same factor, and f has fallen nearly as its slope
        says (its parabola has the minimizer at 1 / shrink^2 times the step or beyond): what was too long where it was
        tried (the lower level was far from solved, say) is not any more.

        After a step that was excused by the check of the model, it is not known whether it was too long. Searches then
        start at the root of the usual factor times the last step.

        After steps whose length was kept, a search starts as much longer as searches in their place would have.
        """
        if not self.resumed:
            policy = dataclasses.replace(policy, c=max(policy.c, 0.5))
        if self.excused:
            policy = dataclasses.replace(policy, grow=math.sqrt(policy.grow))
        elif not self.rejected or self.shortest == 0.0:
            policy = dataclasses.replace(policy, grow=max(policy.grow, 1.0 / policy.shrink))
        if self.kept:
            growth = math.exp(min((1 + self.kept) * math.log(policy.grow), _MOST_GROWTH))
            policy = dataclasses.replace(policy, grow=max(policy.grow, growth))
        return policy

    def stalled(self, promised: float, value: float, rounding: float) -> bool:
        """Return whether what the last step length promises is lost in the rounding of f: no trial could tell.

        That is so at a solution. Not before a trial has been rejected: first steps may be that short by choice. A step
        promises <h, d> or, if the last search has found a steeper slope, as much more as there.

        Args:
            promised: <h, d>.
            value: f.
            rounding: Relative rounding unit of f.
        """
        most = float(self.previous) * promised * max(self.ratio, 1.0)
        return self.rejected and 0.0 < most < rounding * abs(value)

    def after(
        self, record: Record, policy: Any, value: float, rounding: float, excused: bool = False
    ) -> dict[str, Any]:
        """Return what is new after a step, of all but `state`.

        Args:
            record: Its record.
            policy: Its policy.
            value: f before the step.
            rounding: Relative rounding unit of f.
            excused: Whether the check of the model has excused it.
        """
        step, shrink = record.step_size, policy.shrink
        if record.outcome == Outcome.kept:
            return {"kept": self.kept + 1} if visible(step * record.slope, value, rounding) else {}
        news: dict[str, Any] = {"kept": 0}
        if record.moved and excused != self.excused:
            news["excused"] = excused
        if record.moved and math.isfinite(record.slope_ratio):
            news["ratio"] = abs(float(record.slope_ratio))
        if record.trials > 1:
            return {**news, "rejected": True, "shortest": step / shrink if record.moved else math.inf}
        if not (record.moved and step * shrink > self.shortest):
            return news
        minimizer = parabola_minimizer(value, record.slope, step, record.value)
        return {**news, "shortest": 0.0 if minimizer == 0.0 or minimizer * shrink**2 >= step else math.inf}
