"""By how much the losses of a run vary, as their range shows it."""

from __future__ import annotations

__all__ = ["ENOUGH", "spread"]

ENOUGH = 8
"""With fewer losses than this, their range is widened."""


def spread(low: float, high: float, count: int) -> float:
    """Return max{1, 8 / n}^2 (high - low): the range of n losses, widened where n is small.

    Args:
        low: The least of the losses.
        high: The largest of them.
        count: n, at least 1.

    >>> spread(1.0, 2.0, 16), spread(1.0, 2.0, 4)
    (1.0, 4.0)
    """
    return max(1.0, ENOUGH / count) ** 2 * (high - low)
