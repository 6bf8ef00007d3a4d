"""SLS under a bound that holds while the losses fall by less than the steps promise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .context import Context
from .distance import LOSS_MEMORY, STANDARD_ERRORS, estimate, take
from .margin import compared, promised
from .record import Record
from .scalars import resolution
from .sls import SLS
from .state import SearchState

__all__ = ["GuardedSLS"]


@dataclass(frozen=True, kw_only=True)
class GuardedSLS(SLS):
    """Line search with a guard against samples that can each be fitted alone: the default rule of the upper level.

    A search certifies a step on its own sample. If that sample can be fitted alone, as a few episodes of few-shot
    learning can, the search accepts steps that raise the loss of all other samples. The losses then fall by less than
    half of what the steps promise: the margin M of the run (`adaptive_bilevel.policies.margin`, with c / 2) is
    negative. On full batches of a single level, M is never negative. Noise of the losses and a lower level that moves
    can also make it negative. The guard therefore asks for more than M < 0:

        M < -2 s,                            s^2 a mean of the (f_{j+1} - f_j)^2,
        A < (c / 2) sum of the gamma_j n_j,  A = sum of the a_j = <g_{j+1}, x_j - x_{j+1}>,
        A < 2 sqrt(sum of the a_j^2).

    s is the standard error of f_0 - f_k if the losses are noise, and sqrt(sum of the a_j^2) that of A. A says by how
    much the losses of the next samples still fall along the steps. While all three hold (the first alone if ``onward``
    is None),

        gamma_k <= sqrt(max{D^2, S} / (G (k + 1))),    S = sum of gamma_j^2 n_j.

    D is the distance to the solution, and G the mean of the n_j, as `SLSB` estimates them
    (`adaptive_bilevel.policies.distance`; at first, D is gamma_0 sqrt(n_0)). D alone is too small if the best steps
    become longer, for example where x saturates; S keeps the bound at the root mean square of the steps so far. The
    guard needs no evaluation and no option. The options are those of `SLS`.

    In ``examples/benchmarks/NOTES.md``, the start of few-shot networks diverged in 2 of 3 runs with `SLS`.

    >>> policy, f = GuardedSLS(start=1.0), lambda x: x * x
    >>> record, state = policy.step(policy.init(), loss=4.0, slope=16.0, trial=lambda a: f(2.0 - 4.0 * a))
    >>> for _ in range(5):  # each sample is fitted alone, and leaves the next one as bad as before
    ...     record, state = policy.step(state, loss=4.0, slope=16.0, trial=lambda a: f(2.0 - 4.0 * a))
    >>> state.margin < 0.0, record.bound < 1.0
    (True, True)
    """

    def propose(self, state: SearchState, context: Context) -> tuple[Record, SearchState]:
        """Return the record of one search, and the state after it.

        Raises:
            OptionError: There is no trial function.
        """
        loss, slope = float(context.loss), float(context.slope)
        rounding = resolution(context.loss) if context.rounding is None else context.rounding
        seen = compared(state, loss, c=0.5 * self.c, slack=self.slack, rounding=rounding)
        if state.last_gain != 0.0 and math.isfinite(loss):
            change, weight = loss - state.last_loss, (LOSS_MEMORY + 1.0) / (state.seen + LOSS_MEMORY)
            mean = (1.0 - weight) * state.mean_change + weight * change * change
            seen = seen._replace(mean_change=mean)
        if context.onward is not None and math.isfinite(context.onward):
            squares = seen.onward_squares + context.onward * context.onward
            seen = seen._replace(onward=seen.onward + context.onward, onward_squares=squares)
        record, after = super().propose(seen, context)
        if not record.moved:
            return record, state
        step = float(record.step_size)
        estimated = take(estimate(after, loss, slope, step), loss, slope, step)
        return record, promised(estimated._replace(found=after.found), loss, step * slope)

    def kept(self, state: SearchState, loss: float, slope: float, step: float) -> SearchState:
        """Return the state after a step that moved without a search: what it promised is compared with the last one."""
        estimated = take(estimate(state, loss, slope, step), loss, slope, step)._replace(found=state.found)
        gain = step * slope
        together = estimated._replace(last_gain=state.last_gain + gain, gains=state.gains + gain)
        return super().kept(together, loss, slope, step)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        initial, largest = super()._limits(state, initial, context)
        if not (_fits_samples_alone(state, 0.5 * self.c, context) and state.mean_slope > 0.0):
            return initial, largest
        length = max(state.distance, state.squares) / state.mean_slope
        return initial, min(largest, math.sqrt(length / (state.count + 1)))


def _fits_samples_alone(state: SearchState, c: float, context: Context) -> bool:
    """Return whether the steps so far have lowered the losses of their own samples only."""
    if state.margin >= -STANDARD_ERRORS * math.sqrt(state.mean_change):
        return False
    enough = min(c * state.gains, STANDARD_ERRORS * math.sqrt(state.onward_squares))
    return context.onward is None or state.onward < enough
