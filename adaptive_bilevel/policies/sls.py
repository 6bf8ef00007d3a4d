"""Stochastic line search: the largest tried step with sufficient decrease (Fan et al., 2023, eq. (8))."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import validation
from .bounded import without_increase
from .context import Context
from .distance import estimate
from .record import Outcome
from .schedule import DECAYS, ESTIMATED, Decay, decay_factor
from .search import Search
from .state import SearchState
from .trials import Found, Point

__all__ = ["SLS", "SLSB"]


@dataclass(frozen=True, kw_only=True)
class SLS(Search):
    """Stochastic line search: the first step of start, start w, start w^2, ... with sufficient decrease, eq. (8).

    A step gamma passes if f_i(x - gamma d) <= f_i(x) - c gamma <g, d> + slack, up to one rounding unit of the loss's
    dtype (`armijo_threshold`). No step above (f_i - l)/(c <g, d>) can pass, and none is tried.

    Args:
        start: The first trial of the first search, > 0. If None, it is `armijo_ceiling` at the first step. If the loss
            is not above `lower_bound`, trials up and down from `unbounded_length` find it. Later searches may grow
            beyond it.
        c: Armijo constant, in (0, 1).
        shrink: w, the factor from a rejected trial to the next one, in (0, 1).
        grow: eta >= 1, the factor of reset="grow".
        reset: Start of later searches: "initial", "keep" or "grow" (options 1, 2, 3), see `reset`.
        slack: delta >= 0, the increase of the loss that a trial may have.
        lower_bound: l, a lower bound of the loss, or None if there is none.
        max_step: The largest trial, or None for no limit.
        max_trials: Number of trials after which a search fails. If None, it fails at 1e-12 of its first trial.

    Raises:
        OptionError: An option is out of range.

    >>> policy = SLS(start=1.0)
    >>> record, state = policy.step(policy.init(), loss=1.0, slope=4.0, trial=lambda a: (1.0 - 2.0 * a) ** 2)
    >>> record.step_size, record.trials
    (0.5, 2)
    """

    start: float | None = None
    max_step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive("SLS", "start", self.start, optional=True, below_infinity=True)
        validation.positive("SLS", "max_step", self.max_step, optional=True)

    def _given(self, context: Context) -> float | None:
        return self.start if context.bound is None else float(context.bound)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        largest = self.max_step if context.cap is None else context.cap
        return initial, math.inf if largest is None else largest


@dataclass(frozen=True, kw_only=True)
class SLSB(Search):
    """Stochastic line search under a non-increasing bound: start = min{reset(previous), gamma_b,k}, step <= gamma_b,k.

    The options are those of `SLS`, with `bound` and its schedule `decay` in place of `start` and `max_step`. The bound
    gamma_b,0 > 0 is estimated if it is None, see `Envelope`.

    >>> policy = SLSB(bound=1.0)
    >>> policy.step(policy.init(), loss=1.0, slope=4.0, trial=lambda a: (1.0 - 2.0 * a) ** 2)[0].step_size
    0.5
    """

    bound: float | None = None
    decay: Decay = "inverse_sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        validation.positive(owner, "bound", self.bound, optional=True, below_infinity=True)
        validation.choice(owner, "decay", self.decay, DECAYS, or_callable=True)

    def _given(self, context: Context) -> float | None:
        return self.bound if context.bound is None else float(context.bound)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        high = initial * float(decay_factor(self.decay, state.count))
        return high, high if context.cap is None else min(context.cap, high)

    def _find(self, state: SearchState, point: Point, ceiling: float, context: Context) -> Found:
        if self.decay not in ESTIMATED:
            return super()._find(state, point, ceiling, context)
        first, trials, outcome = 0.0, 0, Outcome.zero_gradient
        if state.seen == 0 and math.isfinite(ceiling):
            assert context.trial is not None
            first, trials = without_increase(context.trial, point.loss, point.slope, ceiling, rounding=point.rounding)
            outcome = Outcome.search_failed
        elif state.seen == 0:
            first, trials, outcome = self._tried_length(point, context)
        if state.seen == 0 and first == 0.0:
            return Found(state, False, trials, outcome)
        return Found(estimate(state, point.loss, point.slope, first), True, trials)
