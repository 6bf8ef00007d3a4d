"""The search that `SLS` and `SLSB` share: where it starts, how it backtracks, and what it keeps."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import OptionError
from . import validation
from .armijo import LARGEST_RATIO, armijo_ceiling, armijo_threshold, parabola_minimizer, unbounded_length
from .context import Context, Policy
from .distance import take
from .record import Outcome, Record
from .reset import RESETS, reset
from .scalars import Scalar, resolution
from .state import SearchState
from .trials import Again, Found, Point, Trials

__all__ = ["Search"]

_SMALLEST_RATIO = 1e-12
"""A search gives up below this fraction of its first trial (40 trials with shrink = .5, 263 with .9)."""


@dataclass(frozen=True, kw_only=True)
class Search(Policy[SearchState]):
    """Options of a search. Derived rules say which length is given, `_given`, and how long steps may be, `_limits`."""

    c: float = 0.1
    shrink: float = 0.5
    grow: float = 1.2
    reset: str = "grow"
    slack: float = 0.0
    lower_bound: float | None = 0.0
    max_trials: int | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        validation.fraction(owner, "c", self.c)
        validation.fraction(owner, "shrink", self.shrink)
        validation.at_least_one(owner, "grow", self.grow)
        validation.choice(owner, "reset", self.reset, RESETS)
        validation.non_negative(owner, "slack", self.slack)
        validation.finite(owner, "lower_bound", self.lower_bound, optional=True)
        if self.max_trials is not None:
            validation.count(owner, "max_trials", self.max_trials)
        validation.make_plain(self)

    def init(self) -> SearchState:
        """Return the state before the first step."""
        return SearchState()

    def first_bound(self, *, loss: float, slope: float, lower_bound: float | None = None) -> float:
        """Return the first trial that the lower bound gives where none is given; 0 if it gives none at this point."""
        ceiling = self._ceiling(loss, slope, lower_bound)
        return ceiling if math.isfinite(ceiling) else 0.0

    def first_trial(
        self,
        state: SearchState,
        *,
        loss: float,
        slope: float,
        bound: float | None = None,
        scale: float = 1.0,
        most_ratio: float = LARGEST_RATIO,
    ) -> float:
        """Return where an uncapped search at this point starts."""
        cap = self._ceiling(loss, slope, None, most_ratio)
        found = state.found or (cap if math.isfinite(cap) else unbounded_length(loss, slope, most_ratio))
        return reset(state.previous, bound or scale * found, option=self.reset, grow=self.grow, cap=cap)

    def kept(self, state: SearchState, loss: float, slope: float, step: float) -> SearchState:
        """Return the state after a step that moved without a search, of a length that an earlier one has found."""
        return state._replace(count=state.count + 1)

    def cap(
        self, state: SearchState, *, bound: float | None, scale: float, most: float, onward: float | None = None
    ) -> float:
        """Return what no step is above, whatever the sample: `most`, and a bound in force."""
        context = Context(math.nan, math.nan, bound=bound, scale=scale, cap=most, onward=onward)
        given = self._given(context)
        return self._limits(state, scale * state.found if given is None else given, context)[1]

    def propose(self, state: SearchState, context: Context) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it.

        Raises:
            OptionError: There is no trial function.
        """
        if context.trial is None:
            raise OptionError(f"{type(self).__name__}.step(trial=None): a search needs the function step -> value")
        rounding = resolution(context.loss) if context.rounding is None else context.rounding
        spread = math.sqrt(max(state.loss_variance, 0.0))
        point = Point(float(context.loss), float(context.slope), rounding, spread)
        loss, slope = point[:2]
        if not (math.isfinite(loss) and math.isfinite(slope)):
            return Record(0.0, math.nan, math.inf, Outcome.non_finite, slope=slope), state
        if slope <= 0.0:
            outcome = Outcome.zero_gradient if slope == 0.0 else Outcome.no_descent
            return Record(0.0, 0.0, math.inf, outcome, slope=slope), state
        ceiling = self._ceiling(loss, slope, context.lower_bound, context.most_ratio)
        initial, seen, estimated, before = self._given(context), state, False, 0
        if initial is None:
            seen, estimated, before, outcome = self._find(state, point, ceiling, context)
            if seen.found == 0.0:
                return Record(0.0, 0.0, math.inf, outcome, before, slope=slope), state
            initial = seen.found * context.scale
        high, largest = self._limits(state, initial, context)
        if not high > 0.0:
            outcome = Outcome.non_finite if math.isnan(high) else Outcome.at_bound
            return Record(0.0, high, high, outcome, slope=slope), state
        cap = min(largest, ceiling)
        start = reset(state.previous, initial, option=self.reset, grow=self.grow, cap=cap)
        found = self._backtrack(start, point, context)
        step, outcome, trials, value = found[:4]
        if self._goes_up(state) and outcome == Outcome.accepted and trials == 1:
            step, trials, value = self._go_up(step, value, cap, point, context)
        if outcome != Outcome.accepted:
            return Record(0.0, step, cap, outcome, before + trials, value, slope), state
        if step == cap:
            outcome = Outcome.at_bound
        record = Record(step, step, cap, outcome, before + trials, value, slope)
        # A decrease below the rounding of the loss passes only by its allowance. After rejections such a step says
        # nothing about which length is right, so the next search does not start from it.
        telling = trials == 1 or state.previous == 0.0 or self.c * step * slope > rounding * abs(loss)
        after = take(seen, loss, slope, step) if estimated else seen
        previous = self._resumes(state, start, found._replace(step=step)) if telling else state.previous
        return record, after._replace(count=state.count + 1, previous=previous)

    def _backtrack(self, start: float, point: Point, context: Context) -> Trials:
        """Return what trying start, start w, start w^2, ... comes to.

        A rejected value shows a curvature: the parabola through it has its minimizer at a shorter step. If the test
        could tell a decrease there, but passes only where the decrease asked for is lost in rounding, the loss does not
        fall along d as <g, d> says, and the search has failed. At a solution, that minimizer is lost in rounding too.

        A loss at its lower bound has nothing to gain. That may be none, so steps are tried; the search goes on unless
        the loss is the same at two of them, or the minimizer promises less than what rounding makes of the value.

        Where the loss jumps, the search goes back to the rejected trial of the lowest value, if that will do.
        """
        loss, slope, rounding, _ = point
        at_bound, limit = loss == self._low(context.lower_bound), self._most_trials()
        step, outcome, trials, value, promising, same = start, Outcome.search_failed, 0, math.nan, 0.0, 0
        rejected, steady, jumped, back = list[tuple[float, float]](), True, False, False
        while outcome == Outcome.search_failed and trials < limit and step > 0.0:
            step = start if trials == 0 else step * self.shrink
            trials += 1
            value, decreases, accepted = self._try(step, point, context)
            if accepted:
                outcome = Outcome.accepted
            elif not decreases:
                minimizer = parabola_minimizer(loss, slope, step, value)
                promising = max(promising, minimizer)
                same += value == loss
                if at_bound and (same == 2 or minimizer * slope < rounding * abs(value) < math.inf):
                    outcome = Outcome.at_lower_bound
                rejected.append((value if math.isfinite(value) else math.inf, step))
                if not (steady and self._jumps(rejected, point)):
                    continue
                again = self._go_back(rejected, point, context) if trials < limit else None
                jumped = steady = again is None or again.same
                if again is not None:
                    trials, value, rejected = trials + 1, again.value, []
                    if again.passes:
                        step, outcome, back = again.step, Outcome.accepted, True
        asked = self.c * slope
        if outcome == Outcome.accepted and asked * step <= rounding * abs(loss) < asked * self.shrink * promising:
            outcome = Outcome.search_failed
        return Trials(step, outcome, trials, value, jumped, back)

    def _go_back(self, rejected: Sequence[tuple[float, float]], point: Point, context: Context) -> Again | None:
        """Return the rejected trial of the lowest value, evaluated again; None if its value is not tolerated."""
        lowest, step = min(rejected)
        if not lowest <= self._tolerated(step, point):
            return None
        value = self._value(step, context)
        same = abs(value - lowest) <= point.rounding * abs(point.loss)
        return Again(step, value, same, same and (context.certify is None or context.certify(step)))

    def _jumps(self, rejected: Sequence[tuple[float, float]], point: Point) -> bool:
        """Return whether the last of the rejected trials, values and steps, shows a jump of the loss."""
        return False

    def _tolerated(self, step: float, point: Point) -> float:
        """Return the largest value of a rejected trial that is gone back to."""
        return -math.inf

    def _resumes(self, state: SearchState, start: float, found: Trials) -> float:
        """Return what the next search is continued from, after this one has started there and found that."""
        return found.step

    def _goes_up(self, state: SearchState) -> bool:
        """Return whether a search whose first trial passes goes on with longer ones."""
        return False

    def _go_up(self, step: float, value: float, cap: float, point: Point, context: Context) -> tuple[float, int, float]:
        """Return the last of step, step / w, step / w^2, ... that passes, trials, and its value.

        The last one tried does not pass, so the one that does is tried again at the end: it is where a search ends.
        """
        trials, longer, passes = 1, step / self.shrink, True
        while passes and longer <= cap and trials < self._most_trials():
            trials += 1
            tried, _, passes = self._try(longer, point, context)
            if passes:
                step, value, longer = longer, tried, longer / self.shrink
        if not passes:
            trials += 1
            self._try(step, point, context)
        return step, trials, value

    def _try(self, step: float, point: Point, context: Context) -> tuple[float, bool, bool]:
        """Return the value at a step, whether it is a sufficient decrease, and whether the step passes all tests."""
        loss, slope, rounding, _ = point
        value, certify = self._value(step, context), context.certify
        most = armijo_threshold(loss, slope, step, c=self.c, slack=self.slack, rounding=rounding)
        decreases = math.isfinite(value) and value <= most
        return value, decreases, decreases and (certify is None or certify(step))

    def _value(self, step: float, context: Context) -> float:
        assert context.trial is not None
        return float(context.trial(step))

    def _most_trials(self) -> int:
        return self.max_trials or math.ceil(math.log(_SMALLEST_RATIO) / math.log(self.shrink))

    @abc.abstractmethod
    def _given(self, context: Context) -> float | None:
        """Return the bound or first trial that was given; None: it is to be found."""

    @abc.abstractmethod
    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        """Return that length at this step, and what no trial is above, beside the ceiling of the sample."""

    def _find(self, state: SearchState, point: Point, ceiling: float, context: Context) -> Found:
        """Return the bound or first trial that this point shows: the longest step that could pass, if that is known."""
        if state.found > 0.0:
            return Found(state)
        if math.isfinite(ceiling):
            return Found(state._replace(found=ceiling))
        first, trials, outcome = self._tried_length(point, context)
        return Found(state._replace(found=first), False, trials, outcome)

    def _tried_length(self, point: Point, context: Context) -> tuple[float, int, Outcome]:
        """Return a length that needs no lower bound, 0 if there is none, with the trials made and how that ended.

        From `unbounded_length`, by factors of w up or down: the longest of them up to which all pass the test of
        decrease with c = 1/2 (or above), which no step beyond the minimizer of a parabola does.
        """
        strict = replace(self, c=max(self.c, 0.5))
        start = unbounded_length(point.loss, point.slope, context.most_ratio)
        largest = math.inf if context.cap is None else context.cap
        if not math.isfinite(start):
            return 0.0, 0, Outcome.zero_gradient  # at a solution, a slope of rounding errors gives no scale
        step, outcome, trials = strict._backtrack(min(start, largest), point, context)[:3]
        if outcome != Outcome.accepted:
            return 0.0, trials, outcome
        growing = trials == 1
        while growing and step < largest and trials < self._most_trials():
            longer = min(step / self.shrink, largest, sys.float_info.max)
            trials += 1
            growing = longer > step and strict._try(longer, point, context)[2]
            step = longer if growing else step
        return step, trials, outcome

    def _low(self, lower_bound: Scalar | None) -> float | None:
        return self.lower_bound if lower_bound is None else float(lower_bound)

    def _ceiling(
        self, loss: float, slope: float, lower_bound: Scalar | None, most_ratio: float = LARGEST_RATIO
    ) -> float:
        """Return the longest step that could pass; inf where that is not known."""
        low = self._low(lower_bound)
        if low is None or not (math.isfinite(loss) and math.isfinite(slope) and slope > 0.0 and loss > low):
            return math.inf
        # With slack, a step above the bare ceiling may still pass.
        return float(armijo_ceiling(loss + self.slack, slope, low, self.c, most_ratio))
