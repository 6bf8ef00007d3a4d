"""Reference twins: the rules with their defaults, written to be read beside the papers and to be compared with.

A twin keeps one flat float64 tensor per level, calls autograd directly, and writes each default as a number. It covers
what the problems of `tests/test_twins.py` reach: one parameter group, a loss above its lower bound 0, a direction that
descends, and finite numbers. It asserts what is not obvious of that.

Where torch has a function for an update of torch.optim, twins call it: ``a.add(b, alpha=t)`` is a + t b, and
``torch.lerp(a, b, t)`` is a + t (b - a). So they round as the package does where a level is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EPS", "Direction", "Loss", "Mean", "Momentum", "SecondMoment", "gradient", "longest_without_increase"]

Loss = Callable[[Tensor], Tensor]

EPS = 2.0**-52
"""The rounding unit of float64."""


def gradient(loss: Loss, x: Tensor) -> tuple[float, Tensor]:
    """Return f(x) and its gradient."""
    x = x.clone().requires_grad_()
    value = loss(x)
    (g,) = torch.autograd.grad(value, x)
    return float(value.detach()), g


@dataclass(frozen=True)
class Mean:
    """m_n = .9 m_{n-1} + .1 g_n from m_0 = 0, and m_n / (1 - .9^n), which is a mean of the g."""

    m: Tensor
    n: int = 0

    def add(self, g: Tensor) -> Mean:
        return Mean(torch.lerp(self.m, g, 1 - 0.9), self.n + 1)

    @property
    def mass(self) -> float:
        return 1 - 0.9**self.n

    @property
    def corrected(self) -> Tensor:
        return self.m / self.mass


@dataclass(frozen=True)
class SecondMoment:
    """v_n = .999 v_{n-1} + .001 g_n^2 from v_0 = 0, and Adam's A = R + 1e-8, R = sqrt(v_n / (1 - .999^n)).

    With shrinkage to the root mean square r of R in each tensor of x, A = (1 - w) R + w r + 1e-8 with
    w = shrinkage / (1 + sqrt((1 - .999^n) / .001)).
    """

    v: Tensor
    n: int = 0

    def add(self, g: Tensor) -> SecondMoment:
        return SecondMoment(torch.addcmul(0.999 * self.v, g, g, value=1 - 0.999), self.n + 1)

    def metric(self, shrinkage: float = 0.0, sizes: Sequence[int] = ()) -> Tensor:
        root = self.v.sqrt() / (1 - 0.999**self.n) ** 0.5
        w = shrinkage / (1 + ((1 - 0.999**self.n) / (1 - 0.999)) ** 0.5)
        if w > 0:
            root = torch.cat([R * (1 - w) + (R.dot(R) / len(R)).sqrt() * w for R in root.split(sizes)])
        return root + 1e-8


class Direction:
    """The direction d of the search and the direction e of the step: g and g, or Adam's A^{-1} g and A^{-1} m."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.adam = {"sgd": False, "adam": True}[name]
        self.first, self.second = Mean(torch.zeros_like(x)), SecondMoment(torch.zeros_like(x))

    def at(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return d and e, with g in the moments."""
        if not self.adam:
            return g, g
        first, A = self.first.add(g), self.second.add(g).metric()
        return g / A, first.m / A / first.mass

    def keep(self, g: Tensor) -> None:
        """Take g into the moments: the step along it was taken."""
        self.first, self.second = self.first.add(g), self.second.add(g)


@dataclass(frozen=True)
class Momentum:
    """The step e = A^{-1} ((1 - theta) h + theta m), m the mean of the h: as much of m as predicts the next h.

    theta = sum <h_{k+1} - h_k, m_k - h_k> / sum |m_k - h_k|^2 in [0, 1], in the norm of A^{-1}; both sums are decaying
    means of terms in units of |h_{k+1}|^2 + |h_k|^2, the lower one from 1. An e that does not descend is replaced by
    A^{-1} h, and m starts anew.
    """

    mean: Mean
    h: Tensor
    agreement: float = 0.0
    spread: float = 1.0
    theta: float = 0.0
    restarted: bool = False

    def add(self, h: Tensor, A: Tensor) -> Momentum:
        """Return the momentum with h in it."""
        agreement, spread = self.agreement, self.spread
        if self.mean.n > 0:
            lag, unit = self.mean.corrected - self.h, float(h @ (h / A)) + float(self.h @ (self.h / A))
            agreement += (1 - 0.9) * (float((h - self.h) @ (lag / A)) / unit - agreement)
            spread += (1 - 0.9) * (float(lag @ (lag / A)) / unit - spread)
        mixed = Momentum(self.mean.add(h), h, agreement, spread, weight(agreement, spread))
        if float(h @ mixed.step(A)) > 0:
            return mixed
        return Momentum(Mean(torch.zeros_like(h)).add(h), h, agreement, spread, 0.0, restarted=True)

    @property
    def shrinkage(self) -> float:
        """The shrinkage of Adam's metric at the next h: 1 - theta, also where m started anew."""
        return 1 - weight(self.agreement, self.spread)

    def step(self, A: Tensor) -> Tensor:
        """Return e."""
        return torch.lerp(self.h, self.mean.corrected, self.theta) / A


def weight(agreement: float, spread: float) -> float:
    """Return theta."""
    return min(max(agreement / spread, 0.0), 1.0)


def longest_without_increase(phi: Callable[[float], float], f: float, longest: float) -> float:
    """Return the first of longest, longest / 2, ... at which phi is not above f, 0 after 40 trials."""
    return next((longest / 2**n for n in range(40) if phi(longest / 2**n) <= f), 0.0)
