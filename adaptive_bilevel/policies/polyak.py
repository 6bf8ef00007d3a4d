"""Stochastic Polyak step sizes (Fan et al., 2023, section 3): eqs. (5), (6) and (7)."""

from __future__ import annotations

from dataclasses import dataclass

from . import validation
from .armijo import polyak_ratio
from .bounded import Bounded, advance, clip, tried
from .context import Context, Policy
from .envelope import Envelope
from .record import Record
from .scalars import clock, smaller, where
from .schedule import Decay
from .state import DecSPSState

__all__ = ["SPSB", "DecSPS", "SPSMax"]


@dataclass(frozen=True, kw_only=True)
class SPSMax(Envelope):
    """SPS_max: gamma_k = min{(f_i - l_i) / (c ||grad f_i||^2), gamma_b}, eq. (5).

    It converges to the solution if the model interpolates, and otherwise to a neighbourhood of it. The options are
    those of `Envelope`, with a constant bound.

    >>> policy = SPSMax(bound=1.0)
    >>> policy.step(policy.init(), loss=6.0, slope=20.0)[0].step_size
    0.3
    """


@dataclass(frozen=True, kw_only=True)
class SPSB(Envelope):
    """SPSB: gamma_k = min{(f_i - l_i) / (c ||grad f_i||^2), gamma_b,k}, gamma_b,k non-increasing, eq. (7).

    The options are those of `Envelope`. The bound decays as 1/sqrt(k+1) by default (Theorem 1); decay="inverse" is for
    strongly convex problems (Theorem 2).

    >>> policy = SPSB(bound=0.4)
    >>> policy.step(policy.init(), loss=6.0, slope=20.0)[0].step_size
    0.3
    """

    decay: Decay = "inverse_sqrt"


@dataclass(frozen=True, kw_only=True)
class DecSPS(Bounded, Policy[DecSPSState]):
    """DecSPS: gamma_k = (1/c_k) min{(f_i - l_i) / ||grad f_i||^2, c_{k-1} gamma_{k-1}}, eq. (6), non-increasing.

    Args:
        bound: gamma_b,0 > 0, with c_{-1} gamma_{-1} = c_0 gamma_b,0. If None, it is
            estimated at the first step.
        c: c > 0 in c_k = c sqrt(k+1).
        lower_bound: l, a lower bound of the loss.
        decay: "constant" only; the rule decays without a schedule.

    Raises:
        OptionError: An option is out of range.

    >>> policy = DecSPS(bound=1.0)
    >>> policy.step(policy.init(), loss=6.0, slope=20.0)[0].step_size
    0.3
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive("DecSPS", "c", self.c, below_infinity=True)
        validation.choice("DecSPS", "decay", self.decay, ("constant",))

    def init(self) -> DecSPSState:
        """Return the state before the first step."""
        return DecSPSState()

    def propose(self, state: DecSPSState, context: Context) -> tuple[Record, DecSPSState]:
        """Return the record of one step, and the state after it.

        After the first step, the bound has an effect only if a smaller one overrides it, as a schedule does.

        Raises:
            OptionError: There is no lower bound.
        """
        loss, slope, low = context.loss, context.slope, self._lower_bound(context.lower_bound)
        initial, seen, trials = self._bound(state, context, low)
        c = self.c * (clock(state.count, loss) + 1) ** 0.5
        high = where(state.product > 0, smaller(state.product / c, initial), initial)
        raw = polyak_ratio(loss, slope, low, c, context.most_ratio)
        record = clip(raw, 0.0, high, loss=loss, slope=slope, lower_bound=low)
        record = tried(record, trials, seen.found)
        after = advance(state, seen, record, loss, slope)
        return record, after._replace(product=where(record.step_size > 0, c * record.step_size, state.product))
