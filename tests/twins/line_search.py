"""SLS, SLSB and AutoSLS."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from . import EPS, Direction, Loss, gradient, longest_without_increase
from .polyak import Bound

__all__ = ["SLS", "SLSB", "AutoSLS", "backtrack", "is_start"]


def backtrack(
    phi: Callable[[float], float],
    f: float,
    slope: float,
    start: float,
    c: float = 0.1,
    believed: Callable[[float, float], bool] = lambda a, surplus: True,
) -> tuple[float, int]:
    """Return the first of start, start / 2, ... with phi(a) <= f - c a slope, up to the rounding of f, and the trials.

    After 40 trials it is 0. `believed` is a further test of (a, how far phi(a) is below what is asked for).
    """
    for trials in range(1, 41):
        a = start / 2 ** (trials - 1)
        asked = f + EPS * abs(f) - c * a * slope
        value = phi(a)
        if value <= asked and believed(a, asked - value):
            return a, trials
    return 0.0, 40


def is_start(previous: float, trials: int, decrease: float, f: float) -> bool:
    """Return whether the next search starts from this step: not if, after rejections, rounding accepted it."""
    return previous == 0 or trials == 1 or decrease > EPS * abs(f)


class SLS:
    """x <- x - a e, with the first a of start, start / 2, ... for which f(x - a d) <= f(x) - .1 a <g, d>.

    No a above f / (.1 <g, d>) can pass. The first search starts there, later ones at 1.2 times the last step.

    `other` is a second starting point that BiSLS offers, the one before its prediction. The next step begins between
    the two, at the minimizer along p of the mean of the parabolas through the losses at both and the slope at `other`,
    each in units of the sum of the sizes of its two terms, with weights .9^age.
    """

    def __init__(self, x: Tensor, direction: str = "sgd") -> None:
        self.x, self.direction = x, Direction(direction, x)
        self.previous, self.step_size = 0.0, 0.0
        self.other: Tensor | None = None
        self.parabola: tuple[float, ...] = (0.0, 0.0)

    def choose_start(self, loss: Loss) -> None:
        if self.other is not None:
            p = self.x - self.other
            here, (there, g) = float(loss(self.x)), gradient(loss, self.other)
            linear = float(g @ p)
            square = here - there - linear
            size = abs(linear) + abs(square)
            if size > 0:
                terms = zip(self.parabola, (linear, square), strict=True)
                self.parabola = tuple(0.9 * old + new / size for old, new in terms)
            b, a = self.parabola
            share = (1.0 if b < 0 else 0.0) if a <= 0 else min(max(-b / (2 * a), 0.0), 1.0)
            self.x = self.x if share == 1 else torch.add(self.other, p, alpha=share)
        self.other = None

    def step(self, loss: Loss) -> None:
        self.choose_start(loss)
        f, g = gradient(loss, self.x)
        d, e = self.direction.at(g)
        slope = float(g @ d)
        if slope == 0:
            return  # nothing moves at a stationary point
        longest = f / slope / 0.1
        start = longest if self.previous == 0 else min(1.2 * self.previous, longest)
        a, trials = backtrack(lambda a: float(loss(self.x.add(d, alpha=-a))), f, slope, start)
        if a == 0:
            return  # nothing moves, and the sample leaves no trace
        self.x, self.step_size = self.x.add(e, alpha=-a), a
        self.direction.keep(g)
        if is_start(self.previous, trials, 0.1 * a * slope, f):
            self.previous = a


class SLSB:
    """As `SLS`, with no start above gamma_b,0 / sqrt(k + 1).

    gamma_b,0 is the first time the longest of a, a / 2, ... that does not raise f, from a = f / (.1 <g, d>), and then
    what `Bound` estimates. k counts the steps that moved.
    """

    def __init__(self, x: Tensor, direction: str = "sgd") -> None:
        self.x, self.direction = x, Direction(direction, x)
        self.previous, self.step_size = 0.0, 0.0
        self.bound, self.k = Bound(), 0
        self.losses: list[float] = []
        self.gains: list[float] = []

    def highest(self, f: float, bound: float, longest: float) -> float:
        """Return what no start is above."""
        return min(bound * (self.k + 1) ** -0.5, longest)

    def step(self, loss: Loss) -> None:
        f, g = gradient(loss, self.x)
        d, e = self.direction.at(g)
        slope = float(g @ d)
        assert f > 0 and slope > 0

        def phi(a: float) -> float:
            return float(loss(torch.add(self.x, d, alpha=-a)))

        longest = f / slope / 0.1
        first = longest_without_increase(phi, f, longest) if self.k == 0 else 0.0
        bound = self.bound.see(f, slope, first)
        highest = self.highest(f, bound.value, longest)
        start = min(bound.value if self.previous == 0 else 1.2 * self.previous, highest)
        a, trials = backtrack(phi, f, slope, start)
        if a == 0:
            return  # nothing moves, and the sample leaves no trace
        self.x, self.step_size = self.x.add(e, alpha=-a), a
        self.direction.keep(g)
        self.bound, self.k = bound.take(f, slope, a), self.k + 1
        self.losses.append(f)
        self.gains.append(a * slope)
        if is_start(self.previous, trials, 0.1 * a * slope, f):
            self.previous = a


class AutoSLS(SLSB):
    """As `SLSB` while M < 0, else as `SLS`, where M sums over the steps so far how much more than .1 a <g, d> f fell.

    Each fall is f at the step less f at the next one, and at most as large as the largest a <g, d> so far.
    """

    def highest(self, f: float, bound: float, longest: float) -> float:
        M = 0.0
        for j, (before, after) in enumerate(itertools.pairwise([*self.losses, f])):
            most = max(self.gains[: j + 1])
            fall = min(max(before - after, -most), most)
            M = M + fall - 0.1 * self.gains[j] + EPS * abs(before)
        return super().highest(f, bound, longest) if M < 0 else longest
