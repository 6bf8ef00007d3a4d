"""The tangent of y's answer to x, and the test of how far it holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import EPS, gradient

__all__ = ["Function", "Lower", "Tangent", "conjugate_gradients"]

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

        It passes, too, after the first step, if it is smaller than without any answer of y, and phi - <v, change>
        passes the test of decrease too. If its part along C^T d is small, or x `effective`, |grad_y g| / 2 is an
        excuse. So is that half of the step leaves half of it or more, since then no shorter step is better; but not if
        it is as large as without any answer, and there was no step nor such a rejection before.
        """
        self.excused = False
        change, rounding = self.change(a)
        size, without = float(change.norm()), a * self.push
        linear = (self.tolerance + self.residual) * without + rounding
        followed = size <= (1 + self.residual) * without + rounding
        if size <= linear or (self.resumed and followed and -float(self.v @ change) <= surplus):
            return True
        if abs(float(change @ self.pushed)) > linear * self.push and not self.effective(a, rounding):
            self.inside = True
            return False
        self.excused = True
        limit = linear + 0.5 * float(self.lower.g_y.detach().norm())
        if size <= limit:
            return True
        if float(self.change(a / 2)[0].norm()) < size / 2:
            self.inside = True
            return False
        return self.inside or followed

    def effect(self, a: float) -> Tensor:
        """Return how grad_y g differs at (x - a d, y) from its linear model."""
        x = self.lower.x.detach().add(self.d, alpha=-a)
        g_y = gradient(lambda y: self.lower.g(x, y), self.lower.y.detach())[1]
        return g_y - self.lower.g_y.detach() + a * self.pushed

    def effective(self, a: float, rounding: float) -> bool:
        """Return whether that is small along C^T d, or larger than C^T d itself and no smaller at half of the step."""
        over = self.effect(a)
        if abs(float(over @ self.pushed)) <= (self.tolerance * a * self.push + rounding) * self.push:
            return True
        return float(over.norm()) > a * self.push and float(self.effect(a / 2).norm()) >= float(over.norm()) / 2
