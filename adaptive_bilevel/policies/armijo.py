"""The test of sufficient decrease (Armijo), f(x - gamma d) <= f(x) - c gamma <g, d>, and the steps that can pass it."""

from __future__ import annotations

import math

from .scalars import Scalar, where

__all__ = [
    "LARGEST_RATIO",
    "armijo_ceiling",
    "armijo_threshold",
    "parabola_minimizer",
    "polyak_ratio",
    "unbounded_length",
]

LARGEST_RATIO = 2.0**100
"""A ratio |f| / <g, d> above it is one of rounding errors in g, unless the sizes of x and d say otherwise."""


def armijo_threshold(
    loss: float, slope: float, step: float, *, c: float, slack: float = 0.0, rounding: float = 0.0
) -> float:
    """Return f + slack + rounding |f| - c step slope: the largest value at that step which is a sufficient decrease.

    Eq. (8). A value passes if it is finite and not above the threshold.

    Args:
        loss: f, the loss at step 0.
        slope: <g, d>.
        step: gamma.
        c: Armijo constant, in (0, 1).
        slack: delta >= 0, the increase of the loss that a trial may have.
        rounding: Relative rounding unit of the loss, as a further allowance.

    >>> armijo_threshold(2.0, 4.0, 0.5, c=0.25)
    1.5
    """
    return loss + slack + rounding * abs(loss) - c * step * slope


def polyak_ratio(loss: Scalar, slope: Scalar, lower_bound: Scalar, c: Scalar, most: float = LARGEST_RATIO) -> Scalar:
    """Return max(loss - lower_bound, 0) / (c slope), and inf for a slope that is not positive.

    Where it is above `most` for c = 1, the ratio also is inf. At the default, no division here can overflow (which
    NumPy would warn about), or be by zero.
    """
    gap = loss - lower_bound
    gap = where(gap > 0, gap, 0.0)
    divides = gap * (1.0 / most) < slope
    return where(divides, gap / where(divides, slope, 1.0), float("inf")) / c


def armijo_ceiling(
    loss: Scalar, slope: Scalar, lower_bound: Scalar, c: float = 0.1, most: float = LARGEST_RATIO
) -> Scalar:
    """Return (loss - lower_bound) / (c slope): no longer step can satisfy sufficient decrease with constant c.

    This follows from ``lower_bound <= f(x - a d) <= f(x) - c a slope``. The result caps every search, and is the first
    trial or bound if the user gives none.

    Args:
        loss: f(x).
        slope: <g, d>.
        lower_bound: A lower bound of f.
        c: The constant of sufficient decrease, in (0, 1).
        most: The longest length. The result is inf where the ratio is above it.

    >>> armijo_ceiling(loss=6.0, slope=20.0, lower_bound=0.0, c=0.5)
    0.6
    """
    return polyak_ratio(loss, slope, lower_bound, c, most)


def unbounded_length(loss: float, slope: float, most: float = LARGEST_RATIO) -> float:
    """Return |f| / <g, d>, a length that needs no lower bound, or 1 / sqrt(<g, d>) where f = 0.

    It is inf at a slope of 0, and where the ratio is above `most`.

    It only has the right unit: where f or x is multiplied by a number, it changes as steps have to. (Where f = 0, as
    multiples of f ask for; x - a g then moves by 1.) Whether it is long or short is to be tried.

    >>> unbounded_length(-6.0, 20.0), unbounded_length(0.0, 4.0)
    (0.3, 0.5)
    """
    if loss == 0.0:
        return slope**-0.5 if slope > 0.0 else math.inf
    return float(polyak_ratio(abs(loss), slope, 0.0, 1.0, most))


def parabola_minimizer(loss: float, slope: float, step: float, value: float) -> float:
    """Return the minimizer of the parabola with that value and slope at 0, and the value at step; 0 if it has none.

    >>> parabola_minimizer(2.0, 4.0, 2.0, 2.0)
    1.0
    """
    above = value - loss + step * slope
    return 0.5 * step * (step * slope / above) if 0.0 < above < math.inf else 0.0
