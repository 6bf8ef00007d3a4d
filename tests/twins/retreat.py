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
    """Back to an (x, y) where f was at most the median of the last 16, with a quarter of the length.

    Two such points are kept, n / 2 usual steps apart; the newer one is gone back to n / 2 steps after it.

    A value above them by more than s counts among them when f is back, or with the 16th such value in a row.

    So it does if f is above the n in 4..16 by more than s = max{1, 8 / n}^2 (max - min), or 2 s if it is the first such
    value, nearer to the first f than to the min, and lower there by as much, and if at least half of the move of x
    since then is in entries where h is not 0.
    """

    losses: list[float] = field(default_factory=list)
    first: float = 0.0
    aside: list[float] = field(default_factory=list)
    points: list[tuple[Tensor, Tensor, float, float]] = field(default_factory=list)
    age: int = 0

    @property
    def spread(self) -> float:
        """Return s."""
        return max(1.0, 8 / len(self.losses)) ** 2 * (max(self.losses) - min(self.losses))

    def back(self, f: Function, value: float, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Return x, y and the length there, or None."""
        if len(self.losses) < 4:
            return None
        point = self.points[-1 if 2 * self.age >= len(self.losses) else 0]
        there, y, length, known = point
        low, high, spread = min(self.losses), max(self.losses), self.spread * (1 if self.aside else 2)
        moved = (x - there).square()
        if value <= high + spread or 2 * value <= self.first + low or not 0 < moved.sum() <= 2 * moved[h != 0].sum():
            return None
        gained = value - float(f(there, y))
        if gained <= max(spread, EPS * abs(value)):
            return None
        self.points, self.age, self.aside = [point], 0, []
        self.losses = [seen for seen in self.losses if seen <= known] or [known]
        return there, y, length

    def see(self, value: float, x: Tensor, y: Tensor, length: float) -> None:
        """Take note of a step from (x, y)."""
        if not self.losses:
            self.first = value
        n, usual = len(self.losses), len(self.losses) < 4 or value <= max(self.losses) + self.spread
        self.age += usual
        if n == 0 or (value <= median(self.losses) and 2 * self.age >= n):
            self.points, self.age = [*self.points[-1:], (x, y, length, value)], 0
        if not usual and len(self.aside) < 15:
            self.aside.append(value)
        else:
            self.losses, self.aside = [*self.losses, *self.aside, value][-16:], []
