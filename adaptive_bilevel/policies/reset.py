"""Where the next search starts (Algorithm 3 of Fan et al., 2023)."""

from __future__ import annotations

import sys

__all__ = ["RESETS", "reset"]

RESETS = ("initial", "keep", "grow")


def reset(previous: float, initial: float, *, option: str, grow: float, cap: float) -> float:
    """Return the first trial of the next search.

    Args:
        previous: The last accepted step; 0 before there was one. Failed and zero-gradient steps are not fed.
        initial: The initial bound.
        option: "initial" (option 1: the initial bound), "keep" (option 2: the last step), "grow" (option 3: `grow`
            times the last step). Before there was a step, all start at `initial`.
        grow: The factor eta >= 1 of option 3.
        cap: No start is above it, nor above the largest float: 1100 accepted steps with eta = 2 would be infinite.

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
