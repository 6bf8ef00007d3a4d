"""The test of sufficient decrease (Armijo), f(x - gamma d) <= f(x) - c gamma <g, d>, and the steps that can pass it."""

from __future__ import annotations

from .scalars import Scalar, where

__all__ = ["armijo_ceiling", "armijo_threshold", "polyak_ratio"]


def armijo_threshold(
    loss: float, slope: float, step: float, *, c: float, slack: float = 0.0, rounding: float = 0.0
) -> float:
    """Return f + slack + rounding |f| - c step slope: the largest value at that step which is a sufficient decrease.

    Eq. (8): a finite value passes if it is not above. A value that is not finite is no decrease.

    Args:
        loss: f, the loss at step 0.
        slope: <g, d>.
        step: gamma.
        c: Armijo constant, in (0, 1).
        slack: delta >= 0, an allowed increase.
        rounding: Relative rounding unit of the loss: so much of f is allowed beside the slack.

    >>> armijo_threshold(2.0, 4.0, 0.5, c=0.25)
    1.5
    """
    return loss + slack + rounding * abs(loss) - c * step * slope


def polyak_ratio(loss: Scalar, slope: Scalar, lower_bound: Scalar, c: Scalar) -> Scalar:
    """Return max(loss - lower_bound, 0) / (c slope), and inf for a slope that is not positive.

    Beyond 2^100 the ratio also is inf: no division here can overflow (which NumPy would warn about), or be by zero.
    """
    gap = loss - lower_bound
    gap = where(gap > 0, gap, 0.0)
    divides = gap * 2.0**-100 < slope
    return where(divides, gap / where(divides, slope, 1.0), float("inf")) / c


def armijo_ceiling(loss: Scalar, slope: Scalar, lower_bound: Scalar, c: float = 0.1) -> Scalar:
    """Return (loss - lower_bound) / (c slope): no longer step can satisfy sufficient decrease with constant c.

    From ``lower_bound <= f(x - a d) <= f(x) - c a slope``. It is the largest step worth considering at this point, so
    it serves as cap of every search, and as first trial or bound where the user gave no number.
    """
    return polyak_ratio(loss, slope, lower_bound, c)
