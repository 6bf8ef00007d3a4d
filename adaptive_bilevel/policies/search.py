"""The search that `SLS` and `SLSB` share: where it starts, how it backtracks, and what it keeps."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import OptionError
from . import validation
from .armijo import armijo_ceiling, armijo_threshold
from .context import Context, Policy, Trial
from .distance import take
from .record import Outcome, Record
from .reset import RESETS, reset
from .scalars import Scalar, resolution
from .state import SearchState

__all__ = ["Found", "Point", "Search"]

_SMALLEST_RATIO = 1e-12
"""A search gives up below this fraction of its first trial (40 trials with shrink = .5, 263 with .9)."""


class Found(NamedTuple):
    """A bound or first trial that a search finds by itself.

    Attributes:
        state: The state that holds it; 0 if this point does not show one.
        estimated: Whether it is an estimate, which later steps improve.
        trials: Trials made for it.
    """

    state: SearchState
    estimated: bool = False
    trials: int = 0


class Point(NamedTuple):
    """The numbers of a sample, on the host.

    Attributes:
        loss: f_i(x_k).
        slope: <g, d>.
        rounding: Relative rounding unit of the loss.
    """

    loss: float
    slope: float
    rounding: float


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
        """Return the first trial that the search takes where none is given; 0 if this point does not show one."""
        ceiling = self._ceiling(loss, slope, lower_bound)
        return ceiling if math.isfinite(ceiling) else 0.0

    def first_trial(
        self, state: SearchState, *, loss: float, slope: float, bound: float | None = None, scale: float = 1.0
    ) -> float:
        """Return where an uncapped search at this point starts; inf where that is not known."""
        given = bound or scale * (state.found or self.first_bound(loss=loss, slope=slope))
        cap = self._ceiling(loss, slope, None)
        return reset(state.previous, given, option=self.reset, grow=self.grow, cap=cap) if given else math.inf

    def propose(self, state: SearchState, context: Context) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it.

        Raises:
            OptionError: There is no trial function.
        """
        if context.trial is None:
            raise OptionError(f"{type(self).__name__}.step(trial=None): a search needs the function step -> value")
        rounding = resolution(context.loss) if context.rounding is None else context.rounding
        point = Point(float(context.loss), float(context.slope), rounding)
        loss, slope, _ = point
        if not (math.isfinite(loss) and math.isfinite(slope)):
            return Record(0.0, math.nan, math.inf, Outcome.non_finite, slope=slope), state
        if slope <= 0.0:
            outcome = Outcome.zero_gradient if slope == 0.0 else Outcome.no_descent
            return Record(0.0, 0.0, math.inf, outcome, slope=slope), state
        ceiling = self._ceiling(loss, slope, context.lower_bound)
        initial, seen, estimated, before = self._given(context), state, False, 0
        if initial is None:
            seen, estimated, before = self._find(state, point, ceiling, context.trial)
            if seen.found == 0.0:
                outcome = self._why_nothing_found(loss, context.lower_bound, before)
                return Record(0.0, 0.0, math.inf, outcome, before, slope=slope), state
            initial = seen.found * context.scale
        high, largest = self._limits(state, initial, context)
        if not high > 0.0:
            outcome = Outcome.non_finite if math.isnan(high) else Outcome.at_bound
            return Record(0.0, high, high, outcome, slope=slope), state
        cap = min(largest, ceiling)
        start = reset(state.previous, initial, option=self.reset, grow=self.grow, cap=cap)
        step, accepted, trials, value = self._backtrack(start, point, context)
        if not accepted:
            return Record(0.0, step, cap, Outcome.search_failed, before + trials, value, slope), state
        outcome = Outcome.at_bound if step == cap else Outcome.accepted
        record = Record(step, step, cap, outcome, before + trials, value, slope)
        # A decrease below the rounding of the loss passes only by its allowance. After rejections such a step says
        # nothing about which length is right, so the next search does not start from it.
        telling = trials == 1 or state.previous == 0.0 or self.c * step * slope > rounding * abs(loss)
        after = take(seen, loss, slope, step) if estimated else seen
        return record, after._replace(count=state.count + 1, previous=step if telling else state.previous)

    def _backtrack(self, start: float, point: Point, context: Context) -> tuple[float, bool, int, float]:
        """Return the last of start, start w, start w^2, ... tried, whether it passed, trials, and its value."""
        trial, certify = context.trial, context.certify
        assert trial is not None
        loss, slope, rounding = point
        c, slack = self.c, self.slack
        limit = self.max_trials or math.ceil(math.log(_SMALLEST_RATIO) / math.log(self.shrink))
        step, accepted, trials, value = start, False, 0, math.nan
        while not accepted and trials < limit and step > 0.0:
            step = start if trials == 0 else step * self.shrink
            trials += 1
            value = float(trial(step))
            most = armijo_threshold(loss, slope, step, c=c, slack=slack, rounding=rounding)
            accepted = math.isfinite(value) and value <= most and (certify is None or certify(step))
        return step, accepted, trials, value

    @abc.abstractmethod
    def _given(self, context: Context) -> float | None:
        """Return the bound or first trial that was given; None: it is to be found."""

    @abc.abstractmethod
    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        """Return that length at this step, and what no trial is above, beside the ceiling of the sample."""

    def _find(self, state: SearchState, point: Point, ceiling: float, trial: Trial) -> Found:
        """Return the bound or first trial that this point shows: the longest step that could pass."""
        return Found(state._replace(found=state.found or (ceiling if math.isfinite(ceiling) else 0.0)))

    def _ceiling(self, loss: float, slope: float, lower_bound: Scalar | None) -> float:
        """Return the longest step that could pass; inf where that is not known."""
        low = self.lower_bound if lower_bound is None else float(lower_bound)
        if low is None or not (math.isfinite(loss) and math.isfinite(slope) and slope > 0.0 and loss > low):
            return math.inf
        # With slack, a step above the bare ceiling may still pass.
        return float(armijo_ceiling(loss + self.slack, slope, low, self.c))

    def _why_nothing_found(self, loss: float, lower_bound: Scalar | None, trials: int) -> Outcome:
        """Return the outcome where no length was found. At a solution, a slope of rounding errors gives no scale."""
        if trials:
            return Outcome.search_failed
        low = self.lower_bound if lower_bound is None else float(lower_bound)
        return Outcome.zero_gradient if low is not None and loss > low else Outcome.below_lower_bound
