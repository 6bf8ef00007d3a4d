"""SLS, SLSB and AutoSLS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import EPS, Direction, Loss, Mean, gradient, longest_without_increase
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


def climb(
    phi: Callable[[float], float],
    f: float,
    slope: float,
    start: float,
    longest: float,
    c: float,
    believed: Callable[[float, float], bool],
) -> tuple[float, int]:
    """Return the last of start, 2 start, 4 start, ... up to longest that passes, and the trials."""
    a, trials = start, 1
    while 2 * a <= longest:
        trials += 1
        if backtrack(phi, f, slope, 2 * a, c, believed) != (2 * a, 1):
            break
        a *= 2
    believed(a, f + EPS * abs(f) - c * a * slope - phi(a))  # where the search ends
    return a, trials


def is_start(previous: float, trials: int, decrease: float, f: float) -> bool:
    """Return whether the next search starts from this step: not if, after rejections, rounding accepted it."""
    return previous == 0 or trials == 1 or decrease > EPS * abs(f)


class SLS:
    """x <- x - a e, with the first a of start, start / 2, ... for which f(x - a d) <= f(x) - .1 a <g, d>.

    No a above f / (.1 <g, d>) can pass. The first search starts there, later ones at 1.2 times the last step.
    """

    def __init__(self, x: Tensor, direction: str = "sgd") -> None:
        self.x, self.direction = x, Direction(direction, x)
        self.previous, self.step_size = 0.0, 0.0

    def step(self, loss: Loss) -> None:
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
        highest = min(bound.value * (self.k + 1) ** -0.5, longest)
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
    """As `SLS` while samples agree; then z <- z - a m, and x is a mean of the z.

    There a = min{gamma_b,0 / cbrt(k + 1), longest, twice the longest step before}.
    m is the mean of the gradients since then, or Adam's e. Samples agree while the next losses leave at most half of
    the decreases unconfirmed, and M >= 0, where M sums how much more than .1 a <g, d> f fell; each fall is f at the
    step less f at the next one, and at most as large as the largest a <g, d> so far.

    z is kept as x + ahead. The mean begins anew at z if, by the mean over its samples, f(x) is above f(z) by two
    standard errors.
    """

    def __init__(self, x: Tensor, direction: str = "sgd") -> None:
        super().__init__(x, direction)
        self.ahead, self.n, self.lead, self.variance = torch.zeros_like(x), 0, 0.0, 0.0
        self.m = Mean(torch.zeros_like(x))
        self.agree, self.unconfirmed, self.decreases, self.M = True, 0.0, 0.0, 0.0
        self.ends: list[float] = []
        self.most = 0.0

    def look(self, f: float) -> None:
        """Find out whether the sample with loss f agrees with the one before."""
        before, end, most = self.losses[-1], self.ends[-1], max(self.gains)
        decrease = max(before - end, 0.0)
        self.decreases += decrease
        self.unconfirmed += min(max(abs(f - end) - EPS * max(abs(f), abs(end)), 0.0), decrease)
        self.M += min(max(before - f, -most), most) - 0.1 * self.gains[-1] + EPS * abs(before)
        self.agree = self.unconfirmed <= self.decreases / 2 and self.M >= 0

    def step(self, loss: Loss) -> None:
        averaging = not self.agree  # else this step finds out
        seen = self.agree, self.unconfirmed, self.decreases, self.M
        z = self.x + self.ahead
        f, g = gradient(loss, z)
        if averaging and self.n > 0:
            self.compare(float(loss(self.x)) - f)
        elif self.agree and self.ends:
            self.look(f)
        d, e = self.direction.at(g)
        slope = float(g @ d)
        assert f > 0 and slope > 0
        if averaging and not self.direction.adam:
            self.m = self.m.add(g)
            e = self.m.corrected

        def phi(a: float) -> float:
            return float(loss(torch.add(z, d, alpha=-a)))

        longest = f / slope / 0.1
        first = longest_without_increase(phi, f, longest) if self.k == 0 else 0.0
        bound = self.bound.see(f, slope, first)
        if self.agree:
            a, trials = backtrack(phi, f, slope, min(1.2 * self.previous or bound.value, longest))
            if a == 0:
                self.agree, self.unconfirmed, self.decreases, self.M = seen
                return  # nothing moves, and the sample leaves no trace
        else:
            a, trials = min(bound.value * (self.k + 1) ** (-1 / 3), longest, 2 * self.most), 1
        after, self.step_size, self.most = z.add(e, alpha=-a), a, max(self.most, a)
        self.direction.keep(g)
        self.bound, self.k = bound.take(f, slope, a), self.k + 1
        self.losses.append(f)
        self.gains.append(a * slope)
        self.ends.append(float(loss(after)))
        if is_start(self.previous, trials, 0.1 * a * slope, f):
            self.previous = a
        if not self.agree:
            self.n += 1
            self.ahead = (after - z + self.ahead) * (1 - self.weight(self.n))
        self.x = after - self.ahead

    @staticmethod
    def weight(n: int) -> float:
        return 10 / (n + 9)

    def compare(self, lead: float) -> None:
        w, off = self.weight(self.n), lead - self.lead
        self.lead, self.variance = self.lead + w * off, (1 - w) * (self.variance + w * off * off)
        if self.n >= 4 and self.lead > 2 * (self.variance * 100 / 19 / (self.n + 1)) ** 0.5:
            self.n, self.lead, self.variance = 0, 0.0, 0.0
