"""BiSPS, BiSLS, and the implicit hypergradient that both are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import EPS, Direction, Mean, Momentum, SecondMoment, gradient
from .line_search import SLS, backtrack, is_start
from .pace import Pace
from .polyak import Bound, polyak_step

__all__ = ["BiSLS", "BiSPS", "hypergradient"]

Function = Callable[[Tensor, Tensor], Tensor]
"""(x, y) -> f(x, y) or g(x, y), on one sample."""


class Lower:
    """grad_y g and the products with H = grad^2_yy g, C = grad^2_xy g and C^T at one point."""

    def __init__(self, g: Function, x: Tensor, y: Tensor) -> None:
        self.g, self.x, self.y = g, x.clone().requires_grad_(), y.clone().requires_grad_()
        self.g_x, self.g_y = torch.autograd.grad(g(self.x, self.y), (self.x, self.y), create_graph=True)

    def H(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.g_y, self.y, v, retain_graph=True)[0]

    def C(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.g_y, self.x, v, retain_graph=True)[0]

    def C_transposed(self, d: Tensor) -> Tensor:
        return torch.autograd.grad(self.g_x, self.y, d, retain_graph=True)[0]


def conjugate_gradients(
    H: Callable[[Tensor], Tensor], b: Tensor, refined: int = 0, start: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return w with |b - H w| <= .1 |b|, or after 20 iterations, and |b - H w| / |b|.

    Refined, that is 2 times as many iterations and a tenth of the residual: `refined` times.
    """
    w, r = torch.zeros_like(b), b
    if start is not None:
        image = H(start)
        if 0.5 * float(start @ image) < float(b @ start):  # nearer than 0, in the norm of H
            w, r = start, b - image
    p = r
    for _ in range(20 * 2**refined):
        if float(r @ r) <= (0.1 / 10**refined) ** 2 * float(b @ b):
            break
        Hp = H(p)
        pHp, rr = float(p @ Hp), float(r @ r)
        assert pHp > 0
        w, r = w.add(p, alpha=rr / pHp), r.add(Hp, alpha=-rr / pHp)
        p = r.add(p, alpha=float(r @ r) / rr)
    return w, (float(r @ r) / float(b @ b)) ** 0.5


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


class Tangent:
    """The model y + a w of y's answer to x - a d, w = P C^T d, and the test of that model at a step.

    v approximates H^{-1} f_y: each p that H is multiplied with makes its error orthogonal to H p.
    """

    def __init__(self, f_y: Tensor, lower: Lower, share: float, resumed: bool) -> None:
        self.f_y, self.lower = f_y, lower
        self.v = torch.zeros_like(f_y)
        self.tolerance = 0.5 / share
        self.resumed = self.inside = resumed  # resumed: there was a step before

    def along(self, d: Tensor, f_x: Tensor, refined: int = 0) -> float:
        """Set w for d and return the slope s = <f_x, d> - <f_y, w>; where it is not positive, w is refined once."""
        self.d, push = d, self.lower.C_transposed(d)
        self.pushed, self.push = push, float(push.norm())
        self.w, self.residual = conjugate_gradients(self.H, push, refined)
        if float(f_x @ d) - float(self.f_y @ self.w) <= 0:
            self.w, self.residual = conjugate_gradients(self.H, push, refined + 1, self.w)
        return float(f_x @ d) - float(self.f_y @ self.w)

    def H(self, p: Tensor) -> Tensor:
        Hp = self.lower.H(p)
        self.v = self.v + p * ((float(p @ self.f_y) - float(Hp @ self.v)) / float(p @ Hp))
        return Hp

    def hypergradient(self, f_x: Tensor, refined: int) -> Tensor:
        """Return f_x - C P f_y, with P of refined solves."""
        return f_x - self.lower.C(conjugate_gradients(self.lower.H, self.f_y, refined)[0])

    def expected(self, a: float) -> Tensor:
        """Return grad_y g as the model has it at a step: as at (x, y)."""
        return self.lower.g_y.detach()

    def change(self, a: float) -> tuple[Tensor, float]:
        """Return how grad_y g differs from what is expected at (x - a d, y + a w), and the possible rounding."""
        x, y = self.lower.x.detach().add(self.d, alpha=-a), self.lower.y.detach().add(self.w, alpha=a)
        _, g_y = gradient(lambda y: self.lower.g(x, y), y)
        before = self.expected(a)
        return g_y - before, 8 * EPS * float(g_y.norm() + self.lower.g_y.detach().norm())

    def believed(self, a: float, surplus: float) -> bool:
        """Return whether the change is below (tolerance + residual of w) a |C^T d| + |grad_y g| / 2, or else excused.

        |grad_y g| / 2 counts only if the part of the change along C^T d is small without it.

        It is excused, after the first step, if it is smaller than without any answer of y, and phi - <v, change> passes
        the test of decrease too. It also is if half of the step leaves half of it or more (and of its part along C^T d,
        if that is not small), since then no shorter step is better; but not if it is as large as without any answer,
        and there was no step nor such a rejection before.
        """
        change, rounding = self.change(a)
        size, without = float(change.norm()), a * self.push
        linear = (self.tolerance + self.residual) * without + rounding
        faithful = abs(float(change @ self.pushed)) <= linear * self.push
        limit = linear + 0.5 * float(self.lower.g_y.detach().norm()) * faithful
        followed = size <= (1 + self.residual) * without + rounding
        if size <= limit or (self.resumed and followed and -float(self.v @ change) <= surplus):
            return True
        half = self.change(a / 2)[0]
        smooth = not faithful and abs(float(half @ self.pushed)) < abs(float(change @ self.pushed)) / 2
        if smooth or float(half.norm()) < size / 2:
            self.inside = True
            return False
        return self.inside or (followed and faithful)


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
        M, A, squares = self.M + before - f - 0.05 * gain + EPS * abs(before), self.onward + a, self.onward2 + a * a
        self.seen = M, A, squares
        if M >= 0 or A >= 0.05 * self.gains or A >= 2 * squares**0.5:
            return math.inf
        return float((max(self.bound.D2, self.bound.sum_gamma2_n) / self.bound.G / (self.k + 1)) ** 0.5)

    def take(self, f: float, slope: float, a: float, x: Tensor) -> None:
        if self.last is not None:
            self.M, self.onward, self.onward2 = self.seen
        self.bound, self.k = self.bound.see(f, slope, a).take(f, slope, a), self.k + 1
        self.gains += a * slope
        self.last = f, a * slope, x

    def keep(self, f: float, slope: float, a: float) -> None:
        """Take note of a step without a search, which the next search compares as a part of the last one."""
        assert self.last is not None
        assert self.M >= 0 or self.onward >= min(0.05 * self.gains, 2 * self.onward2**0.5)
        self.bound, self.k = self.bound.see(f, slope, a).take(f, slope, a), self.k + 1
        self.gains += a * slope
        self.last = self.last[0], self.last[1] + a * slope, self.last[2]


class BiSLS:
    """x <- x - a e, with the first a of start, start / 2, ... that passes a test of decrease, and that of `Tangent`.

    phi(a) = f(x - a d, y + a w) <= f(x, y) - c a s, s = <f_x, d> - <f_y, w>, d = h or A^{-1} h, e of `Momentum`.
    No a above f / (c s) can pass. The first search starts there or at lr, with c = .5; later ones have c = .1 and start
    at 1.2 times the last step, or at 2 times it until a trial was rejected, and after it is over 2 times as long as the
    last trial that was rejected and has 7/8 of the decrease that the slope promises. Where s is not positive, h is
    replaced by one of refined solves, twice at most; then nothing moves.

    y moves to y + a w, with w averaged as the h in e are, and the next step of `SLS` keeps a share of that.
    No a is above that of `Guard`. Once a trial was rejected, a last step that promises less than the rounding of f is
    taken again without a trial; it promises a <h, d>, or as much more as the slope of the last search was steeper.
    So are steps that `Pace` keeps, and y moves along with the last w, times sqrt(<h, d> / <h, d> of then). After k of
    them, a search starts at 1.2^(k+1) times the last searched step.
    """

    tangent: type[Tangent] = Tangent
    shared: bool = False  # whether h and the tangent have their products in common: then each step is searched

    def __init__(self, x: Tensor, lower: SLS, direction: str = "sgd", lr: float | None = None) -> None:
        self.x, self.lower, self.lr, self.adam = x, lower, lr, {"sgd": False, "adam": True}[direction]
        self.second, self.momentum = SecondMoment(torch.zeros_like(x)), Momentum(Mean(torch.zeros_like(x)), x)
        self.support, self.tangents = Support(x), Mean(torch.zeros_like(lower.x))
        self.previous, self.step_size, self.rejected, self.shortest = 0.0, 0.0, False, math.inf
        self.ratio = 1.0
        self.guard = Guard()
        self.pace, self.kept, self.last = Pace(), 0, (torch.zeros_like(lower.x), 0.0)

    def directions(self, h: Tensor) -> tuple[SecondMoment, Momentum, Tensor, Tensor]:
        """Return the moments with h in them, d and e."""
        second = self.second.add(h)
        A = second.metric if self.adam else torch.ones_like(h)
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
        share, searched = self.support.share(h), h
        self.pace.see(value)
        a, w = None if self.shared else self.pace.length(value, promised, h, self.rejected), None
        most = self.previous * promised * max(self.ratio, 1.0)
        if self.rejected and not self.pace.undone and 0 < most < EPS * value:
            a = self.previous
        self.pace.add(value)
        if a is not None:
            self.pace.keep(a, promised, x, y)
            self.pace.before = None if self.shared else self.pace.before
            self.guard.keep(value, promised, a)
            if a * promised > EPS * value:
                self.kept += 1
                w = self.last[0] * math.sqrt(promised / self.last[1])
                mean = (Mean(torch.zeros_like(w)) if momentum.restarted else self.tangents).add(w)
        else:
            tangent = self.tangent(f_y, Lower(g, x, y), share, self.previous > 0)
            slope = tangent.along(d, f_x)
            ratio = abs(slope / promised)
            for refined in (1, 2):
                if slope <= 0:
                    h = tangent.hypergradient(f_x, refined)
                    second, momentum, d, e = self.directions(h)
                    slope = tangent.along(d, f_x, refined)
            a, phi = self.search(f, value, slope, tangent, h) if slope > 0 else (0.0, math.nan)
            self.ratio = ratio if a > 0 else self.ratio
            w = tangent.w
            mean = self.tangents = (Mean(torch.zeros_like(w)) if momentum.restarted else self.tangents).add(w)
            self.last = w, float(h @ d)
            self.pace.search(a, promised, phi, searched)
        self.second, self.momentum = second, momentum
        if a > 0:
            self.x, self.step_size = x.add(e, alpha=-a), a
            if w is not None:
                self.lower.other, self.lower.x = y, y + torch.lerp(w, mean.corrected, momentum.theta) * a

    def search(self, f: Function, value: float, slope: float, tangent: Tangent, h: Tensor) -> tuple[float, float]:
        """Return the step, 0 if none passes, and phi there."""
        x, y, d, w = self.x, self.lower.x, tangent.d, tangent.w
        c = 0.5 if self.previous == 0 else 0.1

        def phi(a: float) -> float:
            return float(f(x.add(d, alpha=-a), y.add(w, alpha=a)))

        ceiling = value / slope / c
        longest = min(ceiling, self.guard.longest(value, h, x))
        first, grow = self.lr or ceiling, 1.2 if self.rejected and self.shortest > 0 else 2.0
        if self.kept > 0:
            grow = math.exp((1 + self.kept) * math.log(grow))
        start = min(first if self.previous == 0 else grow * self.previous, longest)
        a, trials = backtrack(phi, value, slope, start, c, tangent.believed)
        if a > 0 and is_start(self.previous, trials, c * a * slope, value):
            self.previous = a
        if a > 0:
            self.guard.take(value, slope, a, x)
        self.rejected = self.rejected or trials > 1
        if trials > 1:
            self.shortest = 2.0 * a if a > 0 else math.inf
        elif a > 2.0 * self.shortest:
            self.shortest = 0.0 if value - phi(a) >= 0.875 * a * slope else math.inf
        self.kept = 0
        return a, phi(a)
