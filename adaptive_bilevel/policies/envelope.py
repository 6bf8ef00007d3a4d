"""The envelope of Fan et al. (2023), eqs. (9) and (10): any raw step, kept between a floor and a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OptionError
from . import validation
from .armijo import polyak_ratio
from .bounded import Bounded, advance, clip, tried
from .context import Context, Policy
from .record import Record
from .scalars import Scalar, clock
from .schedule import DECAYS, Decay, decay_factor
from .state import BoundState

__all__ = ["Constant", "Envelope"]


@dataclass(frozen=True, kw_only=True)
class Constant(Bounded, Policy[BoundState]):
    """A fixed or decaying step: gamma_k = bound * decay(k).

    Args:
        bound: gamma_b,0 > 0. It is required.
        decay: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        lower_bound: Not used. All policies have this option.

    Raises:
        OptionError: An option is out of range.

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

    def propose(self, state: BoundState, context: Context) -> tuple[Record, BoundState]:
        """Return the record of one step, and the state after it."""
        loss, slope = context.loss, context.slope
        bound = self.bound if context.bound is None else context.bound
        high = bound * decay_factor(self.decay, clock(state.count, loss))
        record = clip(high, 0.0, high, loss=loss, slope=slope, lower_bound=-float("inf"))
        return record, advance(state, state, record, loss, slope)


@dataclass(frozen=True, kw_only=True)
class Envelope(Bounded, Policy[BoundState]):
    """Any raw step between a floor and a bound: min{max{min(low_k, high_k), raw_k}, high_k}, eqs. (9) and (10).

    Args:
        bound: high_0 = gamma_b,0 > 0. If None, it is estimated: at first, trials from `armijo_ceiling` downwards find
            the largest step without an increase. With decay="inverse_sqrt", it is estimated again at each later step
            (`adaptive_bilevel.policies.distance`).
        decay: Schedule of the bound.
        c: Constant of the default raw step (loss - lower_bound) / (c slope), a number or a callable k -> number.
        lower_bound: l, a lower bound of the loss. If None, give it to each step.
        floor: low_0, which is omega in (9) and alpha_l,0 in (10); 0 for no floor. The bound limits the floor.
        floor_decay: Schedule of the floor.

    Raises:
        OptionError: An option is out of range.

    >>> policy = Envelope(bound=0.5, decay="inverse_sqrt", floor=0.3)
    >>> policy.step(policy.init(), loss=6.0, slope=20.0, raw=0.125)[0].step_size
    0.3
    """

    c: float | Callable[[Scalar], Scalar] = 1.0
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

    def propose(self, state: BoundState, context: Context) -> tuple[Record, BoundState]:
        """Return the record of one step, and the state after it.

        `trial` is only used to find a first bound. Without it, the first bound is Polyak's ratio ("inverse_sqrt") or
        `armijo_ceiling`.

        Raises:
            OptionError: There is no lower bound, and the rule needs one.
        """
        loss, slope, raw = context.loss, context.slope, context.raw
        low = -float("inf")
        if raw is None or (context.bound is None and self.bound is None):
            low = self._lower_bound(context.lower_bound)
        initial, seen, trials = self._bound(state, context, low)
        k = clock(state.count, loss)
        if raw is None:
            raw = polyak_ratio(loss, slope, low, self.c(k) if callable(self.c) else self.c, context.most_ratio)
        high = initial * decay_factor(self.decay, k)
        floor = self.floor * decay_factor(self.floor_decay, k)
        record = clip(raw, floor, high, loss=loss, slope=slope, lower_bound=low)
        estimated = seen is not state and self.decay == "inverse_sqrt"
        record = tried(record, trials, seen.found)
        return record, advance(state, seen, record, loss, slope, estimated=estimated)
