"""BiSPS, BiSLS, and the implicit hypergradient that both are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import EPS, Direction, Mean, Momentum, SecondMoment, gradient
from .line_search import SLS, backtrack, climb, is_start
from .pace import Pace
from .polyak import Bound, polyak_step
from .retreat import Retreat
from .tangent import Function, Lower, Tangent

__all__ = ["BiSLS", "BiSPS", "hypergradient"]


def partials(f: Function, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return f, f_x and f_y."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = f(x, y)
    f_x, f_y = torch.autograd.grad(value, (x, y), materialize_grads=True)
    return float(value.detach()), f_x.detach(), f_y  # torch 2.9: zeros that materialize_grads makes require grad


def hypergradient(f: Function, g: Function, x: Tensor, y: Tensor, tangent: type[Tangent] | None = None) -> Tensor:
    """Return h = f_x - C P f_y, with P that of a tangent."""
    _, f_x, f_y = partials(f, x, y)
    return (tangent or Tangent)(f_y, Lower(g, x, y), 1.0, True).hypergradient(f_x, 0)


class BiSPS:
    """x <- x - a e, a = min{f / <h, d>, alpha_b,0 / sqrt(k + 1)}, eq. (12).

    The first alpha_b,0 is the first of a, a / 2, ... from a = f / <h, d>, at which grad_y g has changed by at most 4
    times as much as at a / 2.
    With a lower SPSB, its bound decays with the upper steps k.
    """

    def __init__(self, x: Tensor, lower: Any, direction: str = "sgd") -> None:
        self.x, self.lower, self.direction = x, lower, Direction(direction, x)
        self.bound, self.k, self.step_size = Bound(), 0, 0.0
        self.lower.clock = 0

    def step(self, f: Function, g: Function, h: Tensor) -> None:
        value = float(f(self.x, self.lower.x))
        d, e = self.direction.at(h)
        slope = float(h @ d)
        assert value > 0 and slope > 0

        def change(a: float) -> float:
            here, there = (gradient(lambda y: g(x, y), self.lower.x)[1] for x in (self.x, self.x.add(d, alpha=-a)))
            return float((there - here).norm())

        first = value / slope
        if self.k == 0:
            first = next(a for a in (first / 2**n for n in range(40)) if change(a) <= 4 * change(a / 2) < math.inf)
        bound = self.bound.see(value, slope, first)
        a = self.step_size = polyak_step(value, slope, bound, self.k)
        self.x = self.x.add(e, alpha=-a)
        self.direction.keep(h)
        self.bound, self.k = bound.take(value, slope, a), self.k + 1
        self.lower.clock = self.k


class Support:
    """Which part of x a sample covers: entries in which h is not 0 / entries in which it was not 0 lately.

    Once no new entry came for as long as it took to see all of them, counting starts anew, and the last count stands
    until the new one exceeds it.
    """

    def __init__(self, x: Tensor) -> None:
        self.seen, self.age, self.grown, self.before = torch.zeros_like(x, dtype=torch.bool), 0, 0, 0

    def share(self, h: Tensor) -> float:
        """Return that part, with h among what was seen lately."""
        now = h != 0
        seen = now | self.seen
        count, self.age = int(seen.sum()), self.age + 1
        if count > int(self.seen.sum()):
            self.grown = self.age
        share = int(now.sum()) / max(count, self.before)
        self.seen = seen
        if self.age > 2 * self.grown:
            self.seen, self.age, self.grown, self.before = now, 1, 1, count
        return share


class Guard:
    """The longest step while the losses fell, and at the end of the steps still fall, by less than .05 of a <h, d>.

    The second does not hold either where that fall is above twice its standard error.

    It is the larger of the distance that `Bound` estimates and the root of the sum of the a^2 <h, d>, over the root of
    the mean <h, d> and of k + 1.
    """

    def __init__(self) -> None:
        self.bound, self.k, self.M, self.onward, self.gains = Bound(), 0, 0.0, 0.0, 0.0
        self.last: tuple[float, float, Tensor] | None = None
        self.onward2 = 0.0

    def longest(self, f: float, h: Tensor, x: Tensor) -> float:
        if self.last is None:
            return math.inf
        before, gain, start = self.last
        a = float(h @ (start - x))
        M, A, squares = self.M, self.onward + a, self.onward2 + a * a
        if gain > 0:
            M += before - f - 0.05 * gain + EPS * abs(before)
        self.seen = M, A, squares
        return self.bounded(M, A, squares)

    def bounded(self, M: float, A: float, squares: float) -> float:
        if M >= 0 or A >= 0.05 * self.gains or A >= 2 * squares**0.5:
            return math.inf
        return float((max(self.bound.D2, self.bound.sum_gamma2_n) / self.bound.G / (self.k + 1)) ** 0.5)

    def forget(self, x: Tensor) -> None:
        """Compare the next f with nothing; x is where the run went back to."""
        if self.last is not None:
            self.last = self.last[0], 0.0, x

    def take(self, f: float, slope: float, a: float, x: Tensor) -> None:
        if self.last is not None:
            self.M, self.onward, self.onward2 = self.seen
        self.bound, self.k = self.bound.see(f, slope, a).take(f, slope, a), self.k + 1
        self.gains += a * slope
        self.last = f, a * slope, x

    def keep(self, f: float, slope: float, a: float) -> None:
        """Take note of a step without a search, which the next search compares as a part of the last one."""
        assert self.last is not None
        self.bound, self.k = self.bound.see(f, slope, a).take(f, slope, a), self.k + 1
        self.gains += a * slope
        self.last = self.last[0], self.last[1] + a * slope, self.last[2]


class Move:
    """Which share of p = a w y moves by: the minimizer of the mean of the parabolas along the p before.

    They are in units of the sum of the sizes of their two terms, with weights .9^age. That of p is known in the next
    search: y has gone to `there` in units of p, its slope there is <g_y, p>, and its curvature that of the last
    tangent, <w, C^T d> / |w|^2. The first share is 1. What moves y by less than its rounding is not looked at.
    """

    def __init__(self) -> None:
        self.parabola, self.kept, self.curvature = (0.0, 0.0), 1.0, 0.0
        self.p: tuple[Tensor, Tensor] | None = None

    def look(self, y: Tensor, g_y: Tensor) -> None:
        if self.p is None:
            return
        w, place = self.p
        square = float(w @ w)
        if self.a * self.a * square <= EPS * float(y @ y):
            return
        there = self.kept + float(y @ w - place) / (self.a * square)
        curvature = self.curvature * self.a * self.a * square
        linear, bend = self.a * float(g_y @ w) - there * curvature, curvature / 2
        size = abs(linear) + abs(bend)
        if size > 0:
            self.parabola = 0.9 * self.parabola[0] + linear / size, 0.9 * self.parabola[1] + bend / size

    def go(self, y: Tensor, w: Tensor, a: float) -> Tensor:
        s, q = self.parabola
        self.kept = (1.0 if s <= 0 else 0.0) if q <= 0 else min(max(-s / (2 * q), 0.0), 1.0)
        self.p, self.a = (w, y @ w + self.kept * a * (w @ w)), a
        return y.add(w, alpha=a * self.kept)


class BiSLS:
    """x <- x - a e, with the first a of start, start / 2, ... that passes a test of decrease, and that of `Tangent`.

    phi(a) = f(x - a d, y + a w) <= f(x, y) - c a s, s = <f_x, d> - <f_y, w>, d = h or A^{-1} h, e of `Momentum`.
    No a above f / (c s) can pass. The first search starts there or at lr, with c = .5; later ones have c = .1 and start
    at 1.2 times the last step, or at 2 times it until a trial was rejected, and after it is over 2 times as long as the
    last trial that was rejected and has 7/8 of the decrease that the slope promises. Where s is not positive, h is
    replaced by one of refined solves, twice at most; then nothing moves.

    y moves by the share of a w that `Move` has found, with w averaged as the h in e are.
    No a is above that of `Guard`. After an a below a tenth of its first trial a_0, the next search starts from
    sqrt(a_0 a). Once a trial was rejected, a last step that promises less than the rounding of f is
    taken again without a trial; it promises a <h, d>, or as much more as the slope of the last search was steeper.
    So are steps that `Pace` keeps, and y moves along with the last w, w_s, of the direction d_s, as far as d is along
    it: with <h, d_s> / <h, d>_s w_s, and that factor at most sqrt(<h, d> / <h, d>_s). After k of them, a search starts
    at 1.2^(k+1) times the last searched step.
    """

    tangent: type[Tangent] = Tangent
    sizes: Sequence[int] = ()  # of the tensors of x, if it is several
    shared: bool = False  # whether h and the tangent have their products in common: then each step is searched

    def __init__(self, x: Tensor, lower: SLS, direction: str = "sgd", lr: float | None = None) -> None:
        self.x, self.lower, self.lr, self.adam = x, lower, lr, {"sgd": False, "adam": True}[direction]
        self.second, self.momentum = SecondMoment(torch.zeros_like(x)), Momentum(Mean(torch.zeros_like(x)), x)
        self.support, self.tangents = Support(x), Mean(torch.zeros_like(lower.x))
        self.previous, self.step_size, self.rejected, self.shortest = 0.0, 0.0, False, math.inf
        self.ratio, self.excused = 1.0, False
        self.guard = Guard()
        self.retreat = Retreat()
        self.move = Move()
        self.pace, self.kept, self.last = Pace(), 0, (torch.zeros_like(lower.x), 0.0, torch.zeros_like(x))

    def directions(self, h: Tensor) -> tuple[SecondMoment, Momentum, Tensor, Tensor]:
        """Return the moments with h in them, d and e."""
        second = self.second.add(h)
        A = second.metric(self.momentum.shrinkage, self.sizes or [len(h)]) if self.adam else torch.ones_like(h)
        momentum = self.momentum.add(h, A)
        return second, momentum, h / A, momentum.step(A)

    def step(self, f: Function, g: Function, h: Tensor) -> None:
        x, y = self.x, self.lower.x
        value, f_x, f_y = partials(f, x, y)
        second, momentum, d, e = self.directions(h)
        promised = float(h @ d)
        assert value > 0 and promised > 0
        if self.pace.was_bad(value):
            (self.x, self.lower.x), self.kept = self.pace.undo(), 0
            return
        point = self.retreat.back(f, value, x, h)
        if point is not None:
            self.pace.give_up()
            self.x, self.lower.x, length = point
            self.previous, self.kept = min(length, self.previous) / 4, 0
            self.guard.forget(self.x)
            return
        self.retreat.see(value, x, y, self.previous)
        share, searched = self.support.share(h), h
        self.pace.see(value)
        a, w = None if self.shared else self.pace.length(value, promised, h, self.rejected), None
        most = self.previous * promised * max(self.ratio, 1.0)
        if self.rejected and not self.pace.undone and 0 < most < EPS * value:
            a = self.previous
        self.pace.add(value)
        if a is not None:
            a = min(a, self.guard.bounded(self.guard.M, self.guard.onward, self.guard.onward2))
            self.pace.keep(a, promised, x, y)
            self.pace.before = None if self.shared else self.pace.before
            self.guard.keep(value, promised, a)
            if a * promised > EPS * value:
                self.kept += 1
                w_s, s_s, d_s = self.last
                most = math.sqrt(promised / s_s)
                w = w_s * min(max(float(h @ d_s) / s_s, -most), most)
                mean = (Mean(torch.zeros_like(w)) if momentum.restarted else self.tangents).add(w)
        else:
            tangent = self.tangent(f_y, Lower(g, x, y), share, self.previous > 0)
            slope = tangent.along(d, f_x)
            self.move.look(y, tangent.lower.g_y.detach())
            found, ratio = slope, abs(slope / promised)
            for refined in (1, 2):
                if slope <= 0:
                    h = tangent.hypergradient(f_x, refined)
                    second, momentum, d, e = self.directions(h)
                    slope = tangent.along(d, f_x, refined)
            a, phi = self.search(f, value, slope, tangent, h) if slope > 0 else (0.0, math.nan)
            self.ratio = ratio if a > 0 else self.ratio
            w = tangent.w
            mean = self.tangents = (Mean(torch.zeros_like(w)) if momentum.restarted else self.tangents).add(w)
            self.last = w, float(h @ d), d
            self.move.curvature = float(w @ tangent.pushed) / float(w @ w)
            self.pace.search(a, promised, phi, searched, found)
        self.second, self.momentum = second, momentum
        if a > 0:
            self.x, self.step_size = x.add(e, alpha=-a), a
            if w is not None:
                self.lower.x = self.move.go(y, torch.lerp(w, mean.corrected, momentum.theta), a)

    def search(self, f: Function, value: float, slope: float, tangent: Tangent, h: Tensor) -> tuple[float, float]:
        """Return the step, 0 if none passes, and phi there."""
        x, y, d, w = self.x, self.lower.x, tangent.d, tangent.w
        c = 0.5 if self.previous == 0 else 0.1

        def phi(a: float) -> float:
            return float(f(x.add(d, alpha=-a), y.add(w, alpha=a)))

        ceiling = value / slope / c
        longest = min(ceiling, self.guard.longest(value, h, x))
        first, grow = self.lr or ceiling, 1.2 if self.rejected and self.shortest > 0 else 2.0
        grow = 1.2**0.5 if self.excused else grow
        if self.kept > 0:
            grow = math.exp((1 + self.kept) * math.log(grow))
        start = min(first if self.previous == 0 else grow * self.previous, longest)
        a, trials = backtrack(phi, value, slope, start, c, tangent.believed)
        if self.previous == 0 and trials == 1:
            a, trials = climb(phi, value, slope, a, longest, c, tangent.believed)
        if a > 0 and is_start(self.previous, trials, c * a * slope, value):
            self.previous = math.sqrt(start) * math.sqrt(a) if self.previous > 0 and a < 0.1 * start else a
        if a > 0:
            self.guard.take(value, slope, a, x)
            self.excused = tangent.excused
        self.rejected = self.rejected or trials > 1
        if trials > 1:
            self.shortest = 2.0 * a if a > 0 else math.inf
        elif a > 2.0 * self.shortest:
            self.shortest = 0.0 if value - phi(a) >= 0.875 * a * slope else math.inf
        self.kept = 0
        return a, phi(a)
