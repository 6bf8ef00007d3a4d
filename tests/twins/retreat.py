"""When BiSLS goes back to an earlier point."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from . import EPS
from .tangent import Function

__all__ = ["Retreat"]


@dataclass
class Retreat:
    """Back to the last (x, y) where f was at most the median of the last 16, with a quarter of the length.

    So it does if f is above the n in 4..16 by more than s = max{1, 8 / n}^2 (max - min), nearer to the first f than to
    the min, and lower there by more than s, and if at least half of the move of x since then is in entries where h is
    not 0.
    """

    losses: list[float] = field(default_factory=list)
    first: float = 0.0
    point: tuple[Tensor, Tensor, float] | None = None

    def back(self, f: Function, value: float, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Return x, y and the length there, or None."""
        if self.point is None or len(self.losses) < 4:
            return None
        there, y, _ = self.point
        low, high = min(self.losses), max(self.losses)
        spread = max(1.0, 8 / len(self.losses)) ** 2 * (high - low)
        moved = (x - there).square()
        if value <= high + spread or 2 * value <= self.first + low or not 0 < moved.sum() <= 2 * moved[h != 0].sum():
            return None
        gained = value - float(f(there, y))
        return self.point if gained > max(spread, EPS * abs(value)) else None

    def see(self, value: float, x: Tensor, y: Tensor, length: float) -> None:
        """Take note of a step from (x, y)."""
        if not self.losses:
            self.first = value
        if not self.losses or value <= median(self.losses):
            self.point = x, y, length
        self.losses = [*self.losses, value][-16:]
