"""The random bilevel problems of `fuzz`, with y*(x) in closed form or by Newton's method."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Problem", "make"]

FAMILIES = ("convex", "singular", "flat", "noisy", "nonsmooth", "nonconvex")


@dataclass
class Problem:
    """A random problem: y*(x) of the lower level, and the losses of both levels, on a sample.

    Attributes:
        family: One of `FAMILIES`.
        scales: By what f, g, x and y are multiplied.
        hessian: H.
        cross: B.
        shift: b.
        features: f = distance(features y - target) + ridge |x|^2 / 2.
        target: As above.
        ridge: As above.
        noise: Size of what a sample adds to b and to the target.
    """

    family: str
    scales: dict[str, float]
    hessian: Tensor
    cross: Tensor
    shift: Tensor
    features: Tensor
    target: Tensor
    ridge: float
    noise: float

    def lower(self, x: Tensor, y: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Return g at the variables as they are stepped."""
        u, z = x / self.scales["x"], y / self.scales["y"]
        push = self.cross @ u + self.shift + shift
        if self.family == "nonconvex":
            return self.scales["g"] * ((z**4 / 4.0 - z**2 / 2.0).sum() - z @ push)
        return self.scales["g"] * (0.5 * z @ (self.hessian @ z) - z @ push)

    def upper(self, x: Tensor, y: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Return f."""
        u, z = x / self.scales["x"], y / self.scales["y"]
        return self.scales["f"] * self.distance(u, self.features @ z - self.target - shift)

    def distance(self, u: Tensor, residual: Tensor) -> Tensor:
        """Return f without its scale; rows of several points are allowed."""
        penalty = 0.5 * self.ridge * (u**2).sum(-1)
        if self.family == "nonsmooth":
            return residual.abs().sum(-1) + penalty
        squares = 0.5 * (residual**2).sum(-1)
        return (squares / (1.0 + squares) if self.family == "flat" else squares) + penalty

    def solution(self, u: Tensor, near: Tensor | None = None) -> Tensor:
        """Return y*(x) without scales, of rows of x; where y* is not unique, the one that steps from 0 lead to.

        Of several minimizers, it is the one that descent from `near` leads to; None: the global one.
        """
        push = u @ self.cross.T + self.shift
        if self.family != "nonconvex":
            return push @ torch.linalg.pinv(self.hessian, rtol=1e-13, hermitian=True)
        z = push.sign() * (1.5 + push.abs() ** (1 / 3)) if near is None else near
        for _ in range(60):
            z = z - (z**3 - z - push) / (3 * z**2 - 1).clamp(min=1.0)
        return z

    def total(self, u: Tensor, near: Tensor | None = None) -> Tensor:
        """Return F without scales, of rows of x."""
        return self.distance(u, self.solution(u, near) @ self.features.T - self.target)


def make(seed: int) -> Problem:
    """Return the problem of a seed."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    n, d, rows = rng.randint(2, 8), rng.randint(1, 5), rng.randint(2, 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q = torch.linalg.qr(normal(n, n))[0]
    values = torch.logspace(0.0, -rng.uniform(0.0, 8.0), n, dtype=torch.float64)
    if family == "singular":
        values[rng.randint(1, n - 1) :] = 0.0
    hessian = q @ torch.diag(values) @ q.T
    # What x and b push is in the range of H, and as large as y of size 1 asks for.
    cross, shift = (hessian if family != "nonconvex" else torch.eye(n, dtype=torch.float64)) @ normal(n, d + 1), None
    cross, shift = cross[:, :d], cross[:, d]
    scales = {name: 10.0 ** rng.uniform(-12.0, 12.0) for name in "fgxy"}
    noise = 10.0 ** rng.uniform(-3.0, 0.0) if family == "noisy" else 0.0
    ridge = 10.0 ** rng.uniform(-8.0, 0.0)
    return Problem(family, scales, hessian, cross, shift, normal(rows, n), normal(rows), ridge, noise)
