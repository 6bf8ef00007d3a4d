"""Convex quadratics with many variables, of chosen strong convexity and noise, and a closed-form solution.

lower  g(x, y) = 1/2 y'Hy - x'Cy,  H = D + u u'              y*(x) = H^{-1} C x,  C diagonal
upper  f(x, y) = 1/2 ||y - p||^2 + .05 ||x||^2

D has eigenvalues spaced evenly in the logarithm from `mu` to 1. With `noise`, each level's linear term is perturbed by
a draw of that size: what a minibatch does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_bilevel import SLS

from .base import Evaluation, Settings


@dataclass
class WideQuadratic:
    """Float64; "loss" is (F(x) - F*) / (F(x_0) - F*), with F(x) = f(x, y*(x))."""

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    D: Tensor
    u: Tensor
    C: Tensor
    p: Tensor
    noise: float

    def __post_init__(self) -> None:
        self._start, self._best = self.F(self.upper[0].detach()), self.F(self.solution())

    def upper_loss(self, batch: Tensor) -> Tensor:
        x, y = self.upper[0], self.lower[0]
        return (y - self.p - batch).square().sum() / 2 + 0.05 * x.square().sum()

    def lower_loss(self, batch: Tensor) -> Tensor:
        x, y = self.upper[0], self.lower[0]
        return (self.D * y * y).sum() / 2 + (self.u @ y) ** 2 / 2 - ((self.C * x + batch) * y).sum()

    def solve(self, v: Tensor) -> Tensor:
        """H^{-1} v, by the Sherman-Morrison formula."""
        scaled = v / self.D
        return scaled - (self.u @ scaled) / (1 + self.u @ (self.u / self.D)) * self.u / self.D

    def F(self, x: Tensor) -> float:
        return float((self.solve(self.C * x) - self.p).square().sum() / 2 + 0.05 * x.square().sum())

    def solution(self, iterations: int = 2000) -> Tensor:
        """By conjugate gradients on the normal equations."""

        def hessian(v: Tensor) -> Tensor:
            return self.C * self.solve(self.solve(self.C * v)) + 0.1 * v

        x, residual = torch.zeros_like(self.p), self.C * self.solve(self.p)
        direction, square = residual.clone(), residual @ residual
        for _ in range(iterations):
            if square < 1e-26 * (self.p @ self.p):
                break
            image = hessian(direction)
            step = square / (direction @ image)
            x, residual = x + step * direction, residual - step * image
            following = residual @ residual
            direction, square = residual + (following / square) * direction, following
        return x

    def sample_upper(self, generator: torch.Generator) -> Tensor:
        return self._perturbation(generator)

    def sample_lower(self, generator: torch.Generator) -> Tensor:
        return self._perturbation(generator)

    def _perturbation(self, generator: torch.Generator) -> Tensor:
        return self.noise * torch.randn(len(self.p), generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        return {"loss": (self.F(self.upper[0]) - self._best) / (self._start - self._best)}

    def resolve(self) -> Evaluation:
        return {}  # F is exact already

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return SLS(params, lr=self.settings.lower_lr, reset="grow", lower_bound=None)


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    size: int = 100,
    mu: float = 0.1,
    noise: float = 0.0,
    **overrides: Any,
) -> WideQuadratic:
    """Problem number `seed` with `size` variables at each level."""
    random = np.random.default_rng(seed)
    values = [random.permutation(np.geomspace(mu, 1, size)), random.normal(size=size) / np.sqrt(size)]
    values += [random.uniform(0.1, 1, size), random.normal(size=size), 2 * random.normal(size=size)]
    D, u, C, p, start = (torch.tensor(value) for value in values)
    settings = Settings(iterations=100, lower_steps=5, solver="cg", solver_steps=50, solver_tolerance=0.1)
    return WideQuadratic(
        settings=replace(settings, **overrides),
        upper=[start.requires_grad_()],
        lower=[torch.zeros(size, dtype=torch.float64, requires_grad=True)],
        D=D, u=u, C=C, p=p, noise=noise,
    )  # fmt: skip
