"""A line search while samples agree, and a step of the bound's length afterwards.

Samples agree as long as the next ones confirm half of the decreases (`adaptive_bilevel.policies.agreement`); then the
rule is `SLS`. A sample may last for a whole lower loop. So the loss after the upper variable has moved is compared with
the decrease of the whole loop, in sums of their own, and the losses also have to fall by what the test of eq. (8) of
Fan et al. (2023) requires of the steps,

    M = sum_j (f_j(x_j) - f_{j+1}(x_{j+1}) - c gamma_j n_j + slack)  >=  0,

each fall cut to [-r_j, r_j], r_j the largest gamma_i n_i so far.

The upper variable changes the loss, too. Where one of these tests could fail (`AutoSLS.could_disagree`), an upper
optimizer of this package evaluates the last sample again after its step, and that change counts in no test
(`AutoSLS.displaced`), so that full batches always agree. Under other upper optimizers, such a change counts as one step
at most, mostly the shortest. Where a loop starts anew, the optimizer passes nan to `AutoSLS.shifted`, and nothing is
compared.

Where samples disagree, a search says little: the longest step that lowers one sample is too long for all of them if
the sample can be fitted alone (batches with wrong labels), and the lengths that pass follow the worst samples if
curvatures differ (networks: ten times too short on LeNet). On a single level the step there is the bound itself,

    gamma_k = min{gamma_b,0 / cbrt(k + 1), (f_k - l) / (c n_k), max_j<k gamma_j / w},

gamma_b,0 from the distance to the solution, see `adaptive_bilevel.policies.distance`; no trial is made. That distance
is a guess at first, which may be a hundred times too long. So no step is more than 1 / w = 2 times the longest one
before (of a bound that is given: than the longest one that a search has accepted). Such steps are longer than the last
iterate bears, and made for a mean of the iterates, which is what the optimizer `adaptive_bilevel.AutoSLS` leaves in the
parameters. Once an upper variable has moved (`AutoSLS.displaced`), the step is searched below that bound, since longer
steps overfit the lower loss before the upper variable has moved far. Samples that have disagreed are taken to disagree
from then on. ``examples/benchmarks/NOTES.md`` has what was measured, the
exponent included.

A step that is not searched may end where the loss is far above all before. With high and low the largest and the least
of the n losses while samples agreed, or of the first 8, the iterate is lost if

    f(z) > high + s,    f(z) - f(xbar) > s,    s = max{1, 8 / n}^2 (high - low),

where xbar is the mean before this iterate (`AutoSLS.lost`), and n >= 2; or if f(z) is not finite, and f(xbar) is. The
optimizer then goes on from xbar, with shorter steps (`AutoSLS.returned`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .agreement import agreeing, unconfirmed
from .context import Context
from .loss_range import ENOUGH, spread
from .margin import compared, promised
from .record import Record
from .scalars import resolution
from .schedule import Decay, decay_factor
from .sls import SLSB
from .state import SearchState

__all__ = ["AutoSLS"]


@dataclass(frozen=True, kw_only=True)
class AutoSLS(SLSB):
    """Line search while samples agree. Afterwards, the step is the bound, or searched below it in a lower level.

    The options are those of `SLSB`. `bound` is also the first trial. If it is given, no step without a search exceeds
    the longest step that a search has accepted. If it is None, it is estimated from the first step on, see `Envelope`,
    and such a step is at most 1 / w times the longest one before. The default of `decay` is for averaged iterates.

    >>> policy, f = AutoSLS(), lambda x: x * x
    >>> record, state = policy.step(policy.init(), loss=f(1.0), slope=4.0, trial=lambda a: f(1.0 - 2.0 * a))
    >>> x = 1.0 - 2.0 * record.step_size
    >>> _, same = policy.step(state, loss=f(x), slope=4.0 * x * x, trial=lambda a: f(x - 2.0 * x * a))
    >>> _, other = policy.step(state, loss=5.0, slope=4.0, trial=lambda a: 5.0 * f(1.0 - 2.0 * a))
    >>> policy.agrees(same), policy.agrees(other)
    (True, False)
    """

    decay: Decay = "inverse_cbrt"

    def agrees(self, state: SearchState) -> bool:
        """Return whether the samples so far agree."""
        steps, loops = (state.differing, state.decreases), (state.loops_differing, state.loops_decreases)
        return agreeing(*steps) and agreeing(*loops) and state.margin >= 0.0

    def observed(self, state: SearchState, value: float) -> SearchState:
        """Return the state after a step that ended elsewhere than the last trial, at this loss."""
        if not (state.last_decrease > 0.0 and math.isfinite(value)):
            return state._replace(last_decrease=0.0)
        return state._replace(expected=value)

    def could_disagree(self, state: SearchState) -> bool:
        """Return whether the next loss could end the agreement of samples, if the upper variable moves before it."""
        most, margin = state.loop_decrease, state.margin - self.c * state.last_gain
        loops = agreeing(state.loops_differing + most, state.loops_decreases + most)
        return self.agrees(state) and not (loops and margin >= state.largest_gain)

    def displaced(self, state: SearchState, change: float | None) -> SearchState:
        """Return the state after the upper variable has moved.

        Args:
            state: The state.
            change: By how much that has changed the last sample's loss at the present point; None: not evaluated.
                If it is not finite, the next sample is compared with nothing.
        """
        if change is None:
            return state._replace(loop_ends=1, nested=1)
        return self.shifted(state, change)._replace(loop_ends=1, nested=1)

    def shifted(self, state: SearchState, change: float) -> SearchState:
        """Return the state after the loss has changed by so much for a reason that is neither a step nor the sample."""
        if not math.isfinite(change):
            return state._replace(last_decrease=0.0, last_gain=0.0, loop_decrease=0.0, loop_ends=0)
        return state._replace(expected=state.expected + change, last_loss=state.last_loss + change)

    def is_high(self, state: SearchState, here: float) -> bool:
        """Return whether the loss at an iterate is not finite, or as far above the range as that is wide."""
        return not math.isfinite(here) or here > state.highest + _spread(state)

    def lost(self, state: SearchState, here: float, before: float) -> bool:
        """Return whether a step has ended far off, by the losses of a sample at its end and at the mean before it."""
        if not math.isfinite(here):
            return math.isfinite(before)
        return self.is_high(state, here) and here - before > _spread(state)

    def returned(self, state: SearchState) -> SearchState:
        """Return the state after a step was taken back: the next one is at most w times as long.

        The bound becomes w times that step, or half of the bound if that is less.
        """
        bound, last = state.found * float(decay_factor(self.decay, state.count)), state.previous
        part = min(0.5, self.shrink * last / bound) if bound > 0.0 and last > 0.0 else 0.5
        most = self.shrink * last if self.bound is not None or state.found == 0.0 else self.shrink**2 * last
        shorter = state._replace(distance=state.distance * part * part, found=state.found * part)
        if last > 0.0:
            shorter = shorter._replace(longest=min(state.longest, most), previous=self.shrink * last)
        return shorter._replace(weighted_loss=0.0, path=0.0, squares=0.0)

    def propose(self, state: SearchState, context: Context) -> tuple[Record, SearchState]:
        """Return the record of one step, and the state after it.

        Raises:
            OptionError: There is no trial function.
        """
        loss, slope = float(context.loss), float(context.slope)
        rounding = resolution(context.loss) if context.rounding is None else context.rounding
        seen = self._ranged(self._compared(state, loss, rounding), loss)
        if self.agrees(seen):
            record, after = super().propose(seen, context)
            if not record.moved:
                return record, state
            decrease = max(loss - float(record.value), 0.0)
            step = float(record.step_size)
            longest = max(state.longest, step)
            loop = seen.loop_decrease + decrease
            after = after._replace(
                expected=float(record.value), last_decrease=decrease, loop_decrease=loop, longest=longest
            )
            return record, promised(after, loss, step * slope)

        if seen.nested:
            record, after = super().propose(seen, context)
            return (record, after) if record.moved else (record, state)

        def tangent(step: float) -> float:
            return loss - step * slope

        # On its tangent the loss falls enough at once, so the step is the longest that may be tried.
        start = seen._replace(previous=0.0)
        record, after = super().propose(start, context._replace(trial=context.trial and tangent))
        if not record.moved:
            return record, state
        if not self._is_given(context):
            after = after._replace(longest=max(after.longest, float(record.step_size)))
        return record._replace(trials=0, value=math.nan), after

    def _ranged(self, state: SearchState, loss: float) -> SearchState:
        """Return the state with this loss in the range. Losses count while samples agree, and the first 8 always do."""
        if not math.isfinite(loss) or not (state.ranged < ENOUGH or self.agrees(state)):
            return state
        highest, lowest = (max(state.highest, loss), min(state.lowest, loss)) if state.ranged else (loss, loss)
        return state._replace(highest=highest, lowest=lowest, ranged=state.ranged + 1)

    def _compared(self, state: SearchState, loss: float, rounding: float) -> SearchState:
        """Return the state with the last step compared with the loss of this sample."""
        if state.last_gain == 0.0 or not math.isfinite(loss) or not self.agrees(state):
            return state
        after = compared(state, loss, c=self.c, slack=self.slack, rounding=rounding, most=state.largest_gain)
        most = state.loop_decrease if state.loop_ends else state.last_decrease
        differing = unconfirmed(loss, state.expected, most, rounding)
        if not state.loop_ends:
            return after._replace(differing=state.differing + differing, decreases=state.decreases + most)
        after = after._replace(loop_decrease=0.0, loop_ends=0, loops_decreases=state.loops_decreases + most)
        return after._replace(loops_differing=state.loops_differing + differing)

    def _limits(self, state: SearchState, initial: float, context: Context) -> tuple[float, float]:
        limits = super()._limits(state, initial, context)  # which reads the schedule
        if self.agrees(state):
            return initial, math.inf if context.cap is None else context.cap
        if state.nested or not state.longest:
            return limits
        # Nothing is searched. A length that was given is held to what searches have accepted.
        most = state.longest if self._is_given(context) else state.longest / self.shrink
        return min(limits[0], most), min(limits[1], most)

    def _is_given(self, context: Context) -> bool:
        return self.bound is not None or context.bound is not None


def _spread(state: SearchState) -> float:
    """Return by how much losses vary; infinite where that is not known."""
    known = state.ranged > 1 and state.highest > state.lowest
    return spread(state.lowest, state.highest, state.ranged) if known else math.inf
