"""What the rules under a bound share: the bound in force, the clip to it, and the state after a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import OptionError
from . import validation
from .armijo import LARGEST_RATIO, armijo_ceiling, parabola_minimizer, polyak_ratio
from .context import Context, Trial
from .distance import estimate, take
from .record import Outcome, Record, closed_form
from .scalars import Scalar, first, isfinite, larger, like, resolution, smaller, where
from .schedule import DECAYS, ESTIMATED, Decay
from .state import BoundState, DecSPSState

__all__ = ["Bounded", "advance", "clip", "reach", "tried", "without_increase"]

_ACCEPTED, _AT_BOUND, _AT_FLOOR, _NO_DESCENT, _ZERO_GRADIENT, _NON_FINITE, _BELOW, _AT_LOWER = map(
    int,
    (
        *(Outcome.accepted, Outcome.at_bound, Outcome.at_floor, Outcome.no_descent, Outcome.zero_gradient),
        *(Outcome.non_finite, Outcome.below_lower_bound, Outcome.at_lower_bound),
    ),
)
"""As plain integers, which can be traced."""

B = TypeVar("B", BoundState, DecSPSState)


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
            (loss < lower_bound, _BELOW),
            (raw < low, _AT_FLOOR),
            (loss == lower_bound, _AT_LOWER),
            (raw > high, _AT_BOUND),
        ),
        _ACCEPTED,
    )
    step = where(valid & (slope > 0), like(step, slope), 0.0)
    return closed_form(step, raw, high, outcome, slope)


def without_increase(
    trial: Trial, loss: float, slope: float, step: float, *, rounding: float = 0.0
) -> tuple[float, int]:
    """Return the first of step, step/2, ... (40 at most) where the loss is no larger, or 0, and the trials made.

    It is 0, too, where no decrease is seen beyond rounding, although rises seen before promise one at a longer step
    (`parabola_minimizer`): the loss does not fall as the slope says.

    >>> without_increase(lambda a: (1.0 - a) ** 2, 1.0, 2.0, 6.0)
    (1.5, 3)
    """
    most, promising = 40 if step > 0.0 else 0, 0.0
    for trials in range(1, most + 1):
        value = float(trial(step))
        if math.isfinite(value) and value <= loss:
            told = rounding * abs(loss)
            wrong = loss - value <= told < 0.5 * promising * slope and step < promising
            return 0.0 if wrong else step, trials
        promising = max(promising, parabola_minimizer(loss, slope, step, value))
        step /= 2.0
    return 0.0, most


def reach(change: Callable[[float], float], longest: float) -> float | None:
    """Return the first of longest, longest / 2, ... at which the change is at most 4 times that at half of it.

    That is so for changes that are linear or quadratic in the step, but not for those beyond any such model
    (exponential ones, of a parameter that is a logarithm). None if it is so nowhere.

    >>> reach(lambda step: step**2, 8.0), reach(lambda step: 2.0**step - 1.0, 8.0)
    (8.0, 2.0)
    """
    if not 0.0 < longest < math.inf:
        return None
    step, here = longest, change(longest)
    for _ in range(40):
        half = change(0.5 * step)
        if here <= 4.0 * half < math.inf:
            return step
        step, here = 0.5 * step, half
    return None


def tried(record: Record, trials: int, found: Scalar) -> Record:
    """Return the record of a step whose first bound was tried so often, and found or not."""
    if not trials:
        return record
    return record._replace(trials=trials, outcome=record.outcome if found > 0 else int(Outcome.search_failed))


def advance(state: B, seen: B, record: Record, loss: Scalar, slope: Scalar, *, estimated: bool = False) -> B:
    """Return the state after a step: only steps that move count, and only they leave what was seen in the state.

    Args:
        state: The state before the step.
        seen: That state with this sample in it.
        record: The step.
        loss: f_k.
        slope: n_k.
        estimated: Whether the estimates of the bound take the step in too.
    """
    moved = record.step_size > 0
    if moved is False:  # on plain numbers, nothing needs to be chosen field by field
        return state
    after = seen._replace(count=state.count + 1)
    if estimated and isinstance(after, BoundState):
        after = take(after, loss, slope, record.step_size)
    if moved is True:
        return after
    return type(state)(*(_chosen(moved, new, old, slope) for new, old in zip(after, state, strict=True)))


def _chosen(moved: Scalar, new: Scalar, old: Scalar, slope: Scalar) -> Scalar:
    if isinstance(new, int) and isinstance(old, int):
        return where(moved, new, old)
    return where(moved, like(new, slope), like(old, slope))


@dataclass(frozen=True, kw_only=True)
class Bounded:
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

    def first_bound(
        self,
        *,
        loss: Scalar,
        slope: Scalar,
        lower_bound: Scalar | None = None,
        most_ratio: float = LARGEST_RATIO,
    ) -> Scalar:
        """Return the initial bound that the rule takes where none is given; 0 if this point does not show one."""
        low = self.lower_bound if lower_bound is None else lower_bound
        if low is None:
            return 0.0
        ceiling = armijo_ceiling(loss, slope, low, most=most_ratio)
        return where(isfinite(ceiling), ceiling, 0.0)

    def _lower_bound(self, override: Scalar | None) -> Scalar:
        low = self.lower_bound if override is None else override
        if low is None:
            raise OptionError(
                f"{type(self).__name__}(lower_bound=None): the rule needs a lower bound of the loss; give one as an "
                "option or at the step, or use a search (SLS) for losses that are unbounded below"
            )
        return low

    def _bound(self, state: B, context: Context, low: Scalar) -> tuple[Scalar, B, int]:
        """Return the initial bound in force, the state with this sample in it, and trials made.

        Args:
            state: The state before the step.
            context: The step's.
            low: The lower bound of the loss.
        """
        given, trials = self.bound if context.bound is None else context.bound, 0
        if given is not None:
            return given, state, trials
        loss, slope, trial, most = context.loss, context.slope, context.trial, context.most_ratio
        estimated = self.decay in ESTIMATED
        if trial is not None and state.found == 0.0:
            longest = self.first_bound(loss=loss, slope=slope, lower_bound=low, most_ratio=most)
            initial, trials = without_increase(
                trial, float(loss), float(slope), float(longest), rounding=resolution(loss)
            )
            initial = like(initial, slope)
        elif estimated:
            initial = polyak_ratio(loss, slope, low, 1.0, most)
            initial = where(isfinite(initial), initial, 0.0)
        else:
            initial = self.first_bound(loss=loss, slope=slope, lower_bound=low, most_ratio=most)
        if context.cap is not None:
            initial = smaller(initial, like(context.cap, slope))
        if estimated and isinstance(state, BoundState):
            seen = estimate(state, loss, slope, initial)
        else:
            seen = state._replace(found=where(state.found > 0, state.found, initial))
        return seen.found * context.scale, seen, trials
