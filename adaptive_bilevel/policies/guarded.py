"""SLS under a bound that holds while the losses fall by less than the steps promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .armijo import armijo_threshold
from .context import Context
from .distance import STANDARD_ERRORS, estimate, take
from .margin import compared, promised
from .record import Record
from .scalars import resolution
from .sls import SLS
from .state import SearchState
from .trials import Point, Trials

__all__ = ["GuardedSLS"]

_FAR = 0.1
"""A step below this part of its first trial says little of the next one."""

_LEAST = 0.1
"""The constant of sufficient decrease where the loss jumps, for all directions."""


@dataclass(frozen=True, kw_only=True)
class GuardedSLS(SLS):
    """Line search with a guard against samples that can each be fitted alone: the default rule of the upper level.

    A search certifies a step on its own sample. If that sample can be fitted alone, as a few episodes of few-shot
    learning can, the search accepts steps that raise the loss of all other samples. The losses then fall by less than
    half of what the steps promise: the margin M of the run (`adaptive_bilevel.policies.margin`, with c / 2) is
    negative. On full batches of a single level, M is never negative. A lower level that moves can also make it
    negative. Noise can, too. The guard therefore has a second condition, on the gradients of the next samples:

        A = sum of the a_j < min{(c / 2) sum of the gamma_j n_j, 2 sqrt(sum of the a_j^2)},
        a_j = <g_{j+1}, x_j - x_{j+1}>.

    A says by how much the losses of the next samples still fall along the steps. The root is its standard error: where
    gradients are mostly noise, A is small, but it becomes significant if the steps are short. While M < 0 and this
    condition hold (M < 0 alone if ``onward`` is None),

        gamma_k <= sqrt(max{D^2, S} / (G (k + 1))),    S = sum of gamma_j^2 n_j.

    D is the distance to the solution, and G the mean of the n_j, as `SLSB` estimates them
    (`adaptive_bilevel.policies.distance`; at first, D is gamma_0 sqrt(n_0)). D alone is too small if the best steps
    become longer, for example where x saturates; S keeps the bound at the root mean square of the steps so far. The
    guard needs no evaluation and no option. The options are those of `SLS`.

    A first search whose first trial passes goes on with start / w, start / w^2, ... while they pass, so that a first
    trial that is far too short costs evaluations and no steps (with reset="grow").

    The ratio r(gamma) = (f(0) - f(gamma)) / (gamma <g, d>) of a convex loss does not fall as gamma is shortened. If it
    falls from one rejected trial to the next, the loss jumps, as it does where samples cross kinks inside of an
    unrolled loop. Shorter steps are no safer then, and would shrink until they meet no jump. So the search goes back to
    the rejected trial of the lowest value, if that is a sufficient decrease with c = .1 or, in a later search, a rise
    by at most two standard deviations of the recent losses. The trial is evaluated again; if its value differs, the
    closure changes, and the search goes on. The next search continues from the trial before that one, or from gamma_0
    if there was none. If the lowest value is higher, the search goes on.

    After a later search that has gone on past a jump, or has ended below a tenth of its first trial gamma_0, the next
    one continues from sqrt(gamma_0 gamma_k), and not from gamma_k: one sample, or a spike of the hypergradient, may
    have cut it, and from a millionth of a step growth by 1.2 takes 80 steps back.

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

    def _jumps(self, rejected: Sequence[tuple[float, float]], point: Point) -> bool:
        if len(rejected) < 2:
            return False
        (before, longer), (now, shorter) = rejected[-2:]
        chord = shorter / longer * (before - point.loss)
        return now - point.loss > chord + point.rounding * abs(point.loss)

    def _tolerated(self, step: float, point: Point) -> float:
        enough = armijo_threshold(point.loss, point.slope, step, c=min(self.c, _LEAST))
        return max(enough, point.loss + STANDARD_ERRORS * point.spread) if point.spread > 0.0 else enough

    def _resumes(self, state: SearchState, start: float, found: Trials) -> float:
        step = found.step
        if state.previous == 0.0:
            return step
        if found.back:
            return min(start, step / self.shrink)
        return math.sqrt(start) * math.sqrt(step) if found.jumped or step < _FAR * start else step

    def _goes_up(self, state: SearchState) -> bool:
        return state.previous == 0.0 and self.reset == "grow"

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        initial, largest = super()._limits(state, initial, context)
        enough = min(0.5 * self.c * state.gains, STANDARD_ERRORS * math.sqrt(state.onward_squares))
        blamed = state.margin < 0.0 and (context.onward is None or state.onward < enough)
        if not (blamed and state.mean_slope > 0.0):
            return initial, largest
        length = max(state.distance, state.squares) / state.mean_slope
        return initial, min(largest, math.sqrt(length / (state.count + 1)))
