"""SLS with a guard: where samples disagree, no step is longer than those that the samples have agreed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .bounded import without_increase
from .context import Context
from .distance import estimate, take
from .margin import compared, promised
from .record import Record
from .scalars import resolution
from .sls import SLS
from .state import SearchState

__all__ = ["GuardedSLS"]


@dataclass(frozen=True, kw_only=True)
class GuardedSLS(SLS):
    """Stochastic line search with a guard against samples that can each be fitted alone: for the upper level.

    A search certifies a step on its own sample. Where a sample can be fitted alone, as a few episodes of few-shot
    learning can, searches accept steps that raise the loss of all others. It shows in the losses: they fall by less
    than the steps promised, so that the margin M of the run is negative (`adaptive_bilevel.policies.margin`; on full
    batches it never is). As long as M < 0,

        gamma_k <= sqrt(max{D^2, S} / (G (k + 1))),    S = sum of gamma_j^2 n_j,

    D the distance to the solution and G the mean of the n_j as `SLSB` estimates them
    (`adaptive_bilevel.policies.distance`), D being at least the longest step that does not raise the loss of the first
    sample with M < 0. D alone lags where the best steps become longer, as they do where x saturates; S keeps the bound
    at the root mean square of the steps so far. It takes no number, and no evaluation before M < 0. Options as in
    `SLS`.

    Measured (``examples/benchmarks/NOTES.md``): few-shot networks that start at x diverged in 2 of 3 runs without it.

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
        seen = compared(state, loss, c=self.c, slack=self.slack, rounding=rounding)
        if seen.margin < 0.0 and seen.distance_tried == 0.0:
            seen = self._with_distance(seen, context, rounding)
        record, after = super().propose(seen, context)
        if not record.moved:
            return record, state
        step = float(record.step_size)
        estimated = take(estimate(after, loss, slope, 0.0), loss, slope, step)
        return record, promised(estimated._replace(found=after.found), loss, step * slope)

    def _with_distance(self, state: SearchState, context: Context, rounding: float) -> SearchState:
        """Return the state with D at least as far as the loss of this sample does not rise."""
        loss, slope = float(context.loss), float(context.slope)
        ceiling = self._ceiling(loss, slope, context.lower_bound, context.most_ratio)
        if context.trial is None or not math.isfinite(ceiling):
            return state
        longest, _ = without_increase(context.trial, loss, slope, ceiling, rounding=rounding)
        tried = longest * slope * longest
        return state._replace(distance=max(state.distance, tried), distance_tried=tried)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        initial, largest = super()._limits(state, initial, context)
        if state.margin >= 0.0 or not state.mean_slope > 0.0:
            return initial, largest
        length = max(state.distance, state.squares) / state.mean_slope
        return initial, min(largest, math.sqrt(length / (state.count + 1)))
