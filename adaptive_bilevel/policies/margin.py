"""The margin of a run: by how much the losses fell more than the steps promised.

Every step of a search leaves f_j(x_{j+1}) <= f_j(x_j) - c gamma_j n_j + slack, eq. (8) of Fan et al. (2023). If all
samples were one function, the next sample would start there, and the losses would fall by as much,

    a_j = f_j(x_j) - f_{j+1}(x_{j+1}) >= c gamma_j n_j - slack        for each j.

So M = sum_j (a_j - c gamma_j n_j + slack) can become negative only where samples differ: the steps passed the test on
their own samples, and the losses fell by less than the tests require. The a_j of one variable add up to
f_0(x_0) - f_k(x_k), so that noise in the losses cancels.

A variable that starts anew changes the loss without a step being at fault. For a level that may do so, a_j is cut to
[-r_j, r_j], r_j the largest gamma_i n_i so far (what a step could gain at most if f_i is convex).
"""

from __future__ import annotations

import math

from .state import SearchState

__all__ = ["compared", "promised", "shortened"]


def compared(
    state: SearchState, loss: float, *, c: float, slack: float, rounding: float, most: float = math.inf
) -> SearchState:
    """Return the state with the loss of a further sample in its margin.

    Args:
        state: With the last step in it, see `promised`; without one, nothing is compared.
        loss: f_k(x_k).
        c: The constant of the test.
        slack: delta.
        rounding: Relative rounding unit of the loss.
        most: What a_j is cut to.
    """
    if state.last_gain == 0.0 or not math.isfinite(loss):
        return state
    decrease = min(max(state.last_loss - loss, -most), most)
    allowed = slack + rounding * abs(state.last_loss)
    return state._replace(margin=state.margin + decrease - c * state.last_gain + allowed)


def promised(state: SearchState, loss: float, gain: float) -> SearchState:
    """Return the state with a step in it that the next sample is to be compared with.

    Args:
        state: After the step.
        loss: f_k(x_k), where it began.
        gain: gamma_k n_k.
    """
    largest = max(state.largest_gain, gain)
    return state._replace(last_loss=loss, last_gain=gain, largest_gain=largest, gains=state.gains + gain)


def shortened(state: SearchState, part: float) -> SearchState:
    """Return the state where only a part of the step was taken, as under a schedule: the promise is that part, too."""
    if part == 1.0:
        return state
    gain = part * state.last_gain
    return state._replace(last_gain=gain, gains=state.gains + (gain - state.last_gain))
