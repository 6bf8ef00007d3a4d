"""The envelope of Fan et al. (2023), eqs. (9) and (10): any raw step, kept between a floor and a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import OptionError
from . import validation
from .distance import estimate, take
from .record import Outcome, Record, Trial, closed_form
from .scalars import Scalar, clock, first, isfinite, larger, like, smaller, where
from .schedule import DECAYS, Decay, decay_factor

__all__ = ["BoundState", "Constant", "Envelope", "armijo_ceiling", "clip", "polyak_ratio"]

_ACCEPTED, _AT_BOUND, _AT_FLOOR, _NO_DESCENT, _ZERO_GRADIENT, _NON_FINITE, _BELOW_LOWER_BOUND = map(
    int,
    (
        *(Outcome.accepted, Outcome.at_bound, Outcome.at_floor, Outcome.no_descent, Outcome.zero_gradient),
        *(Outcome.non_finite, Outcome.below_lower_bound),
    ),
)
"""As plain integers, which can be traced."""


def polyak_ratio(loss: Scalar, slope: Scalar, lower_bound: Scalar, c: Scalar) -> Scalar:
    """Return max(loss - lower_bound, 0) / (c slope), and inf for a slope that is not positive.

    Beyond 2^100 the ratio also is inf: no division here can overflow (which NumPy would warn about), or be by zero.
    """
    gap = loss - lower_bound
    gap = where(gap > 0, gap, 0.0)
    divides = gap * 2.0**-100 < slope
    return where(divides, gap / where(divides, slope, 1.0), float("inf")) / c


def armijo_ceiling(loss: Scalar, slope: Scalar, lower_bound: Scalar, c: float = 0.1) -> Scalar:
    """Return (loss - lower_bound) / (c slope): no longer step can satisfy sufficient decrease with constant c.

    From ``lower_bound <= f(x - a d) <= f(x) - c a slope``. It is the largest step worth considering at this point, so
    it serves as cap of every search, and as first trial or bound where the user gave no number.
    """
    return polyak_ratio(loss, slope, lower_bound, c)


def clip(raw: Scalar, low: Scalar, high: Scalar, *, loss: Scalar, slope: Scalar, lower_bound: Scalar) -> Record:
    """Return min{max{min(low, high), raw}, high} with its outcome, eq. (9); a step of 0 where nothing may move."""
    low = smaller(low, high)
    step = smaller(larger(raw, low), high)
    valid = isfinite(loss) & isfinite(slope) & isfinite(step) & (raw == raw)
    outcome = first(
        (
            (valid ^ True, _NON_FINITE),
            (slope == 0, _ZERO_GRADIENT),
            (slope < 0, _NO_DESCENT),
            (loss <= lower_bound, _BELOW_LOWER_BOUND),
            (raw < low, _AT_FLOOR),
            (raw > high, _AT_BOUND),
        ),
        _ACCEPTED,
    )
    step = where(valid & (slope > 0), like(step, slope), 0.0)
    return closed_form(step, raw, high, outcome, slope)


def without_increase(trial: Trial, loss: float, step: float) -> tuple[float, int]:
    """Return the first of step, step/2, ... (40 at most) where the loss is no larger, or 0, and the trials made.

    >>> without_increase(lambda a: (1.0 - a) ** 2, 1.0, 6.0)
    (1.5, 3)
    """
    most = 40 if step > 0.0 else 0
    for trials in range(1, most + 1):
        value = float(trial(step))
        if math.isfinite(value) and value <= loss:
            return step, trials
        step /= 2.0
    return 0.0, most


def tried(record: Record, trials: int, found: Scalar) -> Record:
    """Return the record of a step whose first bound was tried so often, and found or not."""
    if not trials:
        return record
    return record._replace(trials=trials, outcome=record.outcome if found > 0 else int(Outcome.search_failed))


class BoundState(NamedTuple):
    """State of a rule under a decaying bound.

    Attributes:
        count: Number of steps that moved; the k of the schedules.
        found: The initial bound that the rule found by itself; 0 before the first step, and when a bound was given.
        seen: Number of samples behind the estimates that follow; see `adaptive_bilevel.policies.distance`.
        mean_loss: Decaying mean of the losses f_j.
        loss_variance: Decaying variance of the losses.
        mean_slope: Decaying mean of the slopes n_j.
        distance: Lower estimate of ||x_0 - x*||^2.
        weighted_loss: sum_j gamma_j f_j.
        path: sum_j gamma_j.
        squares: sum_j gamma_j^2 n_j.
    """

    count: Scalar = 0
    found: Scalar = 0.0
    seen: Scalar = 0
    mean_loss: Scalar = 0.0
    loss_variance: Scalar = 0.0
    mean_slope: Scalar = 0.0
    distance: Scalar = 0.0
    weighted_loss: Scalar = 0.0
    path: Scalar = 0.0
    squares: Scalar = 0.0


def advance(state: Any, seen: Any, record: Record, loss: Scalar, slope: Scalar, *, estimated: bool = False) -> Any:
    """Return the state after a step: only steps that move count, and only they leave what was seen in the state."""
    moved = record.step_size > 0
    if moved is False:  # on plain numbers, nothing needs to be chosen field by field
        return state
    after = seen._replace(count=state.count + 1)
    if estimated:
        after = take(after, loss, slope, record.step_size)
    if moved is True:
        return after
    return type(state)(*(_chosen(moved, new, old, slope) for new, old in zip(after, state, strict=True)))


def _chosen(moved: Any, new: Scalar, old: Scalar, slope: Scalar) -> Scalar:
    if isinstance(new, int) and isinstance(old, int):
        return where(moved, new, old)
    return where(moved, like(new, slope), like(old, slope))


@dataclass(frozen=True, kw_only=True)
class _Bounded:
    """Options of the rules under a bound, and the bound in force."""

    bound: float | None = None
    decay: Decay = "constant"
    lower_bound: float | None = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        validation.positive(owner, "bound", self.bound, optional=True)
        validation.choice(owner, "decay", self.decay, DECAYS, or_callable=True)
        validation.finite(owner, "lower_bound", self.lower_bound, optional=True)
        validation.make_plain(self)

    def first_bound(self, *, loss: Scalar, slope: Scalar, lower_bound: Scalar | None = None) -> Scalar:
        """Return the initial bound that the rule takes where none is given; 0 if this point does not show one."""
        low = self.lower_bound if lower_bound is None else lower_bound
        if low is None:
            return 0.0
        ceiling = armijo_ceiling(loss, slope, low)
        return where(isfinite(ceiling), ceiling, 0.0)

    def _lower_bound(self, override: Scalar | None) -> Scalar:
        low = self.lower_bound if override is None else override
        if low is None:
            raise OptionError(
                f"{type(self).__name__}(lower_bound=None): the rule needs a lower bound of the loss; give one as an "
                "option or at the step, or use a search (SLS) for losses that are unbounded below"
            )
        return low

    def _bound(
        self,
        state: Any,
        override: Scalar | None,
        scale: Scalar,
        loss: Scalar,
        slope: Scalar,
        low: Scalar,
        trial: Trial | None,
    ) -> tuple[Scalar, Any, int]:
        """Return (the initial bound in force, the state that has seen this sample, trials made)."""
        given, trials = self.bound if override is None else override, 0
        if given is not None:
            return given, state, trials
        estimated = self.decay == "inverse_sqrt"
        if trial is not None and state.found == 0.0:
            longest = self.first_bound(loss=loss, slope=slope, lower_bound=low)
            first, trials = without_increase(trial, float(loss), float(longest))
            first = like(first, slope)
        elif estimated:
            first = polyak_ratio(loss, slope, low, 1.0)
            first = where(isfinite(first), first, 0.0)
        else:
            first = self.first_bound(loss=loss, slope=slope, lower_bound=low)
        if estimated:
            seen = estimate(state, loss, slope, first)
        else:
            seen = state._replace(found=where(state.found > 0, state.found, first))
        return seen.found * scale, seen, trials


@dataclass(frozen=True, kw_only=True)
class Constant(_Bounded):
    """A fixed or decaying step: gamma_k = bound * decay(k).

    Args:
        bound: gamma_b,0 > 0; required.
        decay: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        lower_bound: Unused; kept so that all policies take the same options.

    >>> policy = Constant(bound=0.5, decay="inverse")
    >>> record, state = policy.step(policy.init(), loss=1.0, slope=4.0)
    >>> policy.step(state, loss=1.0, slope=4.0)[0].step_size
    0.25
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound is None or self.bound == float("inf"):
            raise OptionError(
                f"Constant(bound={self.bound!r}): a constant step has no rule to find it; give a finite number above 0"
            )

    def init(self) -> BoundState:
        """Return the state before the first step."""
        return BoundState()

    def step(
        self,
        state: BoundState,
        *,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None = None,
        lower_bound: Scalar | None = None,
        shared: Any = None,
        bound: Scalar | None = None,
        scale: Scalar = 1.0,
    ) -> tuple[Record, BoundState]:
        """Return the record of one step, and the state after it."""
        high = (self.bound if bound is None else bound) * decay_factor(self.decay, clock(state.count, loss))
        record = clip(high, 0.0, high, loss=loss, slope=slope, lower_bound=-float("inf"))
        return record, advance(state, state, record, loss, slope)


@dataclass(frozen=True, kw_only=True)
class Envelope(_Bounded):
    """Any raw step between a floor and a bound: min{max{min(low_k, high_k), raw_k}, high_k}, eqs. (9) and (10).

    Args:
        bound: high_0 = gamma_b,0 > 0. None: found from the problem, at first from `armijo_ceiling` down to where
            `trial` shows no increase; under the schedule "inverse_sqrt" estimated anew at each step after that
            (`adaptive_bilevel.policies.distance`).
        decay: Schedule of the bound.
        c: Constant of the default raw step (loss - lower_bound) / (c slope), a number or a callable k -> number.
        lower_bound: l, any lower bound of the loss. None: to be given at each step.
        floor: low_0 = omega of (9) or alpha_l,0 of (10); 0 = no floor. A floor above the bound is the bound.
        floor_decay: Schedule of the floor.

    >>> policy = Envelope(bound=0.5, decay="inverse_sqrt", floor=0.3)
    >>> policy.step(policy.init(), loss=6.0, slope=20.0, raw=0.125)[0].step_size
    0.3
    """

    c: float | Any = 1.0
    floor: float = 0.0
    floor_decay: Decay = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if not callable(self.c):
            validation.positive(owner, "c", self.c, below_infinity=True)
        validation.non_negative(owner, "floor", self.floor)
        validation.choice(owner, "floor_decay", self.floor_decay, DECAYS, or_callable=True)

    def init(self) -> BoundState:
        """Return the state before the first step."""
        return BoundState()

    def step(
        self,
        state: BoundState,
        *,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None = None,
        lower_bound: Scalar | None = None,
        shared: Any = None,
        bound: Scalar | None = None,
        scale: Scalar = 1.0,
        raw: Scalar | None = None,
    ) -> tuple[Record, BoundState]:
        """Return the record of one step, and the state after it.

        Args:
            state: The state before the step.
            loss: f_i(x_k), the sampled loss.
            slope: <g, d>; the squared norm for plain gradients.
            trial: step -> f_i(x_k - step d). Only used where a bound is to be found and there is none yet; without it
                the first bound is Polyak's ratio ("inverse_sqrt") or `armijo_ceiling`.
            lower_bound: Overrides the option for this sample.
            shared: Unused.
            bound: Overrides the initial bound for this step.
            scale: Factor of a bound that the rule found by itself.
            raw: The raw step, any number; by default Polyak's ratio. NaN counts as non-finite.

        Raises:
            OptionError: The rule needs a lower bound, and there is none.
        """
        low = -float("inf")
        if raw is None or (bound is None and self.bound is None):
            low = self._lower_bound(lower_bound)
        initial, seen, trials = self._bound(state, bound, scale, loss, slope, low, trial)
        k = clock(state.count, loss)
        if raw is None:
            raw = polyak_ratio(loss, slope, low, self.c(k) if callable(self.c) else self.c)
        high = initial * decay_factor(self.decay, k)
        floor = self.floor * decay_factor(self.floor_decay, k)
        record = clip(raw, floor, high, loss=loss, slope=slope, lower_bound=low)
        estimated = seen is not state and self.decay == "inverse_sqrt"
        record = tried(record, trials, seen.found)
        return record, advance(state, seen, record, loss, slope, estimated=estimated)
