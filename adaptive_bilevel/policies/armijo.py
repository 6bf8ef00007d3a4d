"""Stochastic line search: the largest tried step with sufficient decrease (Fan et al., 2023, eq. (8))."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import OptionError
from . import validation
from .distance import estimate, take
from .envelope import armijo_ceiling, without_increase
from .record import Outcome, Record, Trial
from .reset import RESETS, reset
from .scalars import Scalar, resolution
from .schedule import DECAYS, Decay, decay_factor

__all__ = ["SLS", "SLSB", "SearchState"]

Certificate = Callable[[float], bool]


class SearchState(NamedTuple):
    """State of a search.

    Attributes:
        count: Number of steps that moved; the k of the schedules.
        found: The initial bound or first trial that the search found by itself; 0 before, and when one was given.
        previous: The last accepted step; 0 before there was one.
        seen: This and what follows are the estimates of `BoundState`, used by `SLSB` without a bound.
        mean_loss: See `BoundState`.
        loss_variance: See `BoundState`.
        mean_slope: See `BoundState`.
        distance: See `BoundState`.
        weighted_loss: See `BoundState`.
        path: See `BoundState`.
        squares: See `BoundState`.
    """

    count: int = 0  # type: ignore[assignment]
    found: float = 0.0
    previous: float = 0.0
    seen: int = 0
    mean_loss: float = 0.0
    loss_variance: float = 0.0
    mean_slope: float = 0.0
    distance: float = 0.0
    weighted_loss: float = 0.0
    path: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Search:
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

    def _ceiling(self, loss: float, slope: float, lower_bound: float | None) -> float:
        """Return the longest step that could pass; inf where that is not known."""
        low = self.lower_bound if lower_bound is None else float(lower_bound)
        if low is None or not (math.isfinite(loss) and math.isfinite(slope) and slope > 0.0 and loss > low):
            return math.inf
        # With slack, a step above the bare ceiling may still pass.
        return float(armijo_ceiling(loss + self.slack, slope, low, self.c))

    def _find(
        self, state: SearchState, loss: float, slope: float, ceiling: float, trial: Trial
    ) -> tuple[SearchState, bool, int]:
        """Return the state with a bound or first trial that was found, whether it is an estimate, and trials made."""
        return state._replace(found=state.found or (ceiling if math.isfinite(ceiling) else 0.0)), False, 0

    def _search(
        self,
        state: SearchState,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None,
        lower_bound: Scalar | None,
        rounding: float | None,
        certify: Certificate | None,
        given: float | None,
        factor: float | None,
        largest: float,
        scale: float,
    ) -> tuple[Record, SearchState]:
        """Search from the reset rule's start, under given * factor (SLSB) and `largest`."""
        if trial is None:
            raise OptionError(f"{type(self).__name__}.step(trial=None): a search needs the function step -> value")
        rounding = resolution(loss) if rounding is None else rounding
        loss, slope = float(loss), float(slope)
        if not (math.isfinite(loss) and math.isfinite(slope)):
            return Record(0.0, math.nan, math.inf, Outcome.non_finite, slope=slope), state
        if slope <= 0.0:
            outcome = Outcome.zero_gradient if slope == 0.0 else Outcome.no_descent
            return Record(0.0, 0.0, math.inf, outcome, slope=slope), state
        ceiling = self._ceiling(loss, slope, lower_bound)
        seen, estimated, before = state, False, 0
        if given is None:
            seen, estimated, before = self._find(state, loss, slope, ceiling, trial)
            if seen.found == 0.0:
                low = self.lower_bound if lower_bound is None else float(lower_bound)
                # At a solution, a slope made of rounding errors gives no scale either.
                above = low is not None and loss > low
                outcome = Outcome.zero_gradient if above else Outcome.below_lower_bound
                outcome = Outcome.search_failed if before else outcome
                return Record(0.0, 0.0, math.inf, outcome, before, slope=slope), state
            given = seen.found * scale
        high = given if factor is None else given * factor
        if not high > 0.0:
            outcome = Outcome.non_finite if math.isnan(high) else Outcome.at_bound
            return Record(0.0, high, high, outcome, slope=slope), state
        cap = min(largest, ceiling) if factor is None else min(largest, high, ceiling)
        start = reset(state.previous, given, option=self.reset, grow=self.grow, cap=cap)
        threshold = loss + self.slack + rounding * abs(loss)
        candidate, accepted, trials, value = start, False, 0, math.nan
        limit = self.max_trials or math.ceil(math.log(_SMALLEST_RATIO) / math.log(self.shrink))
        while not accepted and trials < limit and candidate > 0.0:
            candidate = start if trials == 0 else candidate * self.shrink
            trials += 1
            value = float(trial(candidate))
            accepted = math.isfinite(value) and value <= threshold - self.c * candidate * slope
            accepted = accepted and (certify is None or certify(candidate))
        if not accepted:
            return Record(0.0, candidate, cap, Outcome.search_failed, before + trials, value, slope), state
        outcome = Outcome.at_bound if candidate == cap else Outcome.accepted
        record = Record(candidate, candidate, cap, outcome, before + trials, value, slope)
        # A decrease below the rounding of the loss passes only by the allowance above. After rejections such a step
        # says nothing about which length is right, so the next search does not start from it.
        telling = trials == 1 or state.previous == 0.0 or self.c * candidate * slope > rounding * abs(loss)
        after = take(seen, loss, slope, candidate) if estimated else seen
        return record, after._replace(count=state.count + 1, previous=candidate if telling else state.previous)


_SMALLEST_RATIO = 1e-12
"""A search gives up below this fraction of its first trial (40 trials with shrink = .5, 263 with .9)."""


@dataclass(frozen=True, kw_only=True)
class SLS(_Search):
    """Stochastic line search: the first step of start, start w, start w^2, ... with sufficient decrease, eq. (8).

    Accepts gamma as soon as f_i(x - gamma d) <= f_i(x) - c gamma <g, d> + slack, up to one rounding unit of the loss's
    dtype. No step above (f_i - l)/(c <g, d>) can pass, so none is tried.

    Args:
        start: The first trial of the first search, > 0. None: found at the first step, see `armijo_ceiling`. Later
            searches may grow beyond it.
        c: Armijo constant, in (0, 1).
        shrink: w, the factor between two trials, in (0, 1).
        grow: eta >= 1 of reset="grow".
        reset: Start of the later searches: "initial", "keep" or "grow" (options 1, 2, 3), see `reset`.
        slack: delta >= 0, an allowed increase.
        lower_bound: l, any lower bound of the loss; None if there is none (then `start` is required).
        max_step: No trial is above it; None = no cap.
        max_trials: Trials before a search has failed; None: until the step is 1e-12 of the first trial.

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
        if self.start is None and self.lower_bound is None:
            raise OptionError(
                "SLS(start=None, lower_bound=None): without a lower bound of the loss the first trial cannot be found; "
                "give one of the two"
            )

    def step(
        self,
        state: SearchState,
        *,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None = None,
        lower_bound: Scalar | None = None,
        shared: Any = None,
        bound: Scalar | None = None,
        rounding: float | None = None,
        certify: Certificate | None = None,
        max_step: float | None = None,
        scale: float = 1.0,
    ) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it.

        Args:
            state: The state before the step.
            loss: f_i(x_k), the sampled loss.
            slope: <g, d>; the squared norm for plain gradients.
            trial: step -> f_i(x_k - step d), on the same sample. Values that are not finite are rejected.
            lower_bound: Overrides the option for this sample.
            shared: Unused.
            bound: Overrides `start` for this step.
            rounding: Relative rounding unit of the loss; None: that of the loss's dtype.
            certify: A further test, asked about a step right after its trial passed; False rejects it.
            max_step: Overrides the option for this step.
            scale: Factor of a first trial that the search found by itself.
        """
        given = self.start if bound is None else float(bound)
        largest = self.max_step if max_step is None else max_step
        largest = math.inf if largest is None else largest
        return self._search(state, loss, slope, trial, lower_bound, rounding, certify, given, None, largest, scale)


@dataclass(frozen=True, kw_only=True)
class SLSB(_Search):
    """Stochastic line search under a non-increasing bound: start = min{reset(previous), gamma_b,k}, step <= gamma_b,k.

    Options as in `SLS`, with `bound` (gamma_b,0 > 0; None: found, see `Envelope`) and its `decay` in the place of
    `start` and `max_step`.

    >>> policy = SLSB(bound=1.0)
    >>> policy.step(policy.init(), loss=1.0, slope=4.0, trial=lambda a: (1.0 - 2.0 * a) ** 2)[0].step_size
    0.5
    """

    bound: float | None = None
    decay: Decay = "inverse_sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive("SLSB", "bound", self.bound, optional=True, below_infinity=True)
        validation.choice("SLSB", "decay", self.decay, DECAYS, or_callable=True)
        if self.bound is None and self.lower_bound is None:
            raise OptionError(
                "SLSB(bound=None, lower_bound=None): without a lower bound of the loss the bound cannot be found; "
                "give one of the two"
            )

    def _find(
        self, state: SearchState, loss: float, slope: float, ceiling: float, trial: Trial
    ) -> tuple[SearchState, bool, int]:
        if self.decay != "inverse_sqrt" or (state.seen == 0 and not math.isfinite(ceiling)):
            return super()._find(state, loss, slope, ceiling, trial)
        first, trials = without_increase(trial, loss, ceiling) if state.seen == 0 else (0.0, 0)
        return estimate(state, loss, slope, first), True, trials

    def step(
        self,
        state: SearchState,
        *,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None = None,
        lower_bound: Scalar | None = None,
        shared: Any = None,
        bound: Scalar | None = None,
        rounding: float | None = None,
        certify: Certificate | None = None,
        max_step: float | None = None,
        scale: float = 1.0,
    ) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it (arguments as in `SLS.step`)."""
        given = self.bound if bound is None else float(bound)
        factor = float(decay_factor(self.decay, state.count))
        largest = math.inf if max_step is None else max_step
        return self._search(state, loss, slope, trial, lower_bound, rounding, certify, given, factor, largest, scale)
