"""The first trial of the next search (Algorithm 3 of Fan et al., 2023)."""

from __future__ import annotations

import sys

__all__ = ["RESETS", "reset"]

RESETS = ("initial", "keep", "grow")


def reset(previous: float, initial: float, *, option: str, grow: float, cap: float) -> float:
    """Return the first trial of the next search.

    Args:
        previous: The last accepted step; 0 before the first one. Steps that moved nothing do not count.
        initial: The initial bound.
        option: "initial" (option 1: the initial bound), "keep" (option 2: the last step), "grow" (option 3: `grow`
            times the last step). The first search starts at `initial`.
        grow: The factor eta >= 1 of option 3.
        cap: Upper limit of the result, which is also at most the largest float.

    >>> [reset(0.5, 8.0, option=option, grow=2.0, cap=10.0) for option in RESETS]
    [8.0, 0.5, 1.0]
    >>> reset(0.0, 8.0, option="grow", grow=2.0, cap=10.0)
    8.0
    """
    if option == "initial" or previous <= 0.0:
        start = initial
    else:
        start = previous if option == "keep" else grow * previous
    return min(start, cap, sys.float_info.max)
