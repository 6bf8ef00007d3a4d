"""A line search that is bounded once its samples have disagreed: SLS where they agree, SLSB where they do not.

Every step of a search leaves f_j(x_{j+1}) <= f_j(x_j) - c gamma_j n_j + slack, eq. (8) of Fan et al. (2023). If all
samples were one function, the next sample would start there, and the losses would fall by as much,

    a_j = f_j(x_j) - f_{j+1}(x_{j+1}) >= c gamma_j n_j - slack        for each j.

So the margin of the run, M = sum_j (a_j - c gamma_j n_j + slack), can become negative only where samples differ: the
steps passed the test on their own samples, and the losses fell by less than the tests require. As long as M >= 0 the
rule is `SLS`; where M < 0 the bound of `SLSB` holds. On full batches M is never negative, so the step is that of SLS.

The a_j of one variable add up to f_0(x_0) - f_k(x_k), so that noise in the losses cancels. An upper variable that
moves, or a lower one that starts anew, changes the loss without a step being at fault. Therefore a_j is cut to
[-r_j, r_j], r_j the largest gamma_i n_i so far (what a step could gain at most if f_i is convex): once per lower loop
it weighs no more than a step. Loops that each start anew from the same point may still show as disagreement, most of
all short ones; there, `SLS` is the rule for full batches. M needs the losses and slopes of the search alone: no
evaluation, no copy of x, no number of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .context import Context
from .record import Record
from .scalars import resolution
from .sls import SLSB
from .state import SearchState

__all__ = ["AutoSLS"]


@dataclass(frozen=True, kw_only=True)
class AutoSLS(SLSB):
    """Stochastic line search, under the non-increasing bound of `SLSB` as long as the margin of the run is negative.

    Options as in `SLSB`. `bound` is the first trial, too; None: found, see `Envelope`, and estimated from the first
    step on, whether it is in force or not.

    >>> policy, f = AutoSLS(), lambda x: x * x
    >>> record, state = policy.step(policy.init(), loss=f(1.0), slope=4.0, trial=lambda a: f(1.0 - 2.0 * a))
    >>> x = 1.0 - 2.0 * record.step_size
    >>> _, same = policy.step(state, loss=f(x) + 1e-3, slope=4.0 * x * x, trial=lambda a: f(x - 2.0 * x * a))
    >>> _, other = policy.step(state, loss=5.0, slope=4.0, trial=lambda a: 5.0 * f(1.0 - 2.0 * a))
    >>> same.margin > 0.0 > other.margin
    True
    """

    def propose(self, state: SearchState, context: Context) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it.

        Raises:
            OptionError: There is no trial function.
        """
        rounding = resolution(context.loss) if context.rounding is None else context.rounding
        loss, slope = float(context.loss), float(context.slope)
        record, after = super().propose(self._compared(state, loss, rounding), context)
        if not record.moved:
            return record, state
        gain = float(record.step_size) * slope
        return record, after._replace(last_loss=loss, last_gain=gain, largest_gain=max(after.largest_gain, gain))

    def _compared(self, state: SearchState, loss: float, rounding: float) -> SearchState:
        """Return the state with the loss of this sample in the margin."""
        if state.last_gain == 0.0 or not math.isfinite(loss):
            return state
        most = state.largest_gain
        decrease = min(max(state.last_loss - loss, -most), most)
        allowed = self.slack + rounding * abs(state.last_loss)
        return state._replace(margin=state.margin + decrease - self.c * state.last_gain + allowed)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        limits = super()._limits(state, initial, context)
        if state.margin < 0.0:
            return limits
        return initial, math.inf if context.cap is None else context.cap
