"""Whether samples agree: a step ends at a loss that it has seen, and the next sample would begin there.

If all samples were one function, then f_{j+1}(x_{j+1}) = f_j(x_{j+1}). So the part of the decreases
A_j = f_j(x_j) - f_j(x_{j+1}) that the next sample does not confirm,

    sum_j min{|f_{j+1}(x_{j+1}) - f_j(x_{j+1})|, A_j}  /  sum_j A_j,

is 0 on full batches, up to rounding. Samples agree while it is at most 1/2: the majority.
"""

from __future__ import annotations

import math

__all__ = ["agreeing", "identical", "unconfirmed"]

_UNCONFIRMED = 0.5


def unconfirmed(loss: float, expected: float, decrease: float, rounding: float) -> float:
    """Return how much of a decrease the loss of the next sample does not confirm.

    Args:
        loss: f_{j+1}(x_{j+1}).
        expected: f_j(x_{j+1}).
        decrease: A_j.
        rounding: Relative rounding unit of the loss.
    """
    differing = abs(loss - expected) - rounding * max(abs(loss), abs(expected))
    return min(max(differing, 0.0), decrease)


def agreeing(differing: float, decreases: float) -> bool:
    """Return whether samples agree.

    Args:
        differing: The sum of what was not confirmed.
        decreases: The sum of the decreases.

    >>> agreeing(unconfirmed(0.75, 0.5, 0.5, 0.0), 0.5), agreeing(unconfirmed(1.0, 0.5, 0.5, 0.0), 0.5)
    (True, False)
    """
    return differing <= _UNCONFIRMED * decreases


def identical(differing: float, decreases: float, rounding: float) -> bool:
    """Return whether all samples are one function: nothing differs, to half of the digits; False before a decrease.

    Args:
        differing: The sum of what was not confirmed.
        decreases: The sum of the decreases.
        rounding: Relative rounding unit of the loss.

    >>> identical(1e-12, 1.0, 1e-16), identical(1e-3, 1.0, 1e-16)
    (True, False)
    """
    return decreases > 0.0 and differing <= math.sqrt(rounding) * decreases
