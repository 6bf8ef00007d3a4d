"""Random convex quadratics: small deterministic bilevel problems with a closed-form solution.

lower  g(x, y) = 1/2 y'Hy + x'Cy + b'y                          y*(x) = -H^{-1} (C'x + b)
upper  f(x, y) = 1/2 ||y||^2 + .05 ||x||^2 + p'y + q'x + 10
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
class RandomQuadratic:
    """Float64, full batch; "loss" is F(x) = f(x, y*(x)) and "gap" is (F(x) - F*) / (F(x_0) - F*)."""

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    H: Tensor
    C: Tensor
    b: Tensor
    p: Tensor
    q: Tensor

    def __post_init__(self) -> None:
        self._start = self.F(self.upper[0].detach())
        self._best = self.F(self.solution())

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return y @ y / 2 + 0.05 * (x @ x) + self.p @ y + self.q @ x + 10.0

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return y @ self.H @ y / 2 + x @ self.C @ y + self.b @ y

    def response(self, x: Tensor) -> Tensor:
        return -torch.linalg.solve(self.H, self.C.T @ x + self.b)

    def F(self, x: Tensor) -> float:
        return float(self.f(x, self.response(x)))

    def solution(self) -> Tensor:
        jacobian = -torch.linalg.solve(self.H, self.C.T)
        constant = self.response(torch.zeros_like(self.q))
        hessian = 0.1 * torch.eye(len(self.q), dtype=torch.float64) + jacobian.T @ jacobian
        return -torch.linalg.solve(hessian, self.q + jacobian.T @ (constant + self.p))

    def upper_loss(self, batch: None) -> Tensor:
        return self.f(self.upper[0], self.lower[0])

    def lower_loss(self, batch: None) -> Tensor:
        return self.g(self.upper[0], self.lower[0])

    def sample_upper(self, generator: torch.Generator) -> None:
        return None

    def sample_lower(self, generator: torch.Generator) -> None:
        return None

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        value = self.F(self.upper[0])
        return {"loss": value, "gap": (value - self._best) / (self._start - self._best)}

    def resolve(self) -> Evaluation:
        return {}  # F is exact already

    def lower_rule(self, params: list[Tensor]) -> SLS:
        return SLS(params, lr=self.settings.lower_lr, reset="initial", lower_bound=None)


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    mu: float = 0.2,
    lower_size: int = 4,
    upper_size: int = 3,
    **overrides: Any,
) -> RandomQuadratic:
    """Problem number `seed`; the smallest eigenvalue of H is at least `mu`. The draws are NumPy's, in a fixed order."""
    normal = np.random.default_rng(seed).normal
    root = normal(size=(lower_size, lower_size))
    hessian = root @ root.T / lower_size + mu * np.eye(lower_size)
    coupling, b = normal(size=(upper_size, lower_size)), normal(size=lower_size)
    p, q = normal(size=lower_size), 0.1 * normal(size=upper_size)
    start = 2 * normal(size=upper_size)
    settings = Settings(
        iterations=60,
        lower_steps=1,
        lower_lr=10.0,
        solver="cg",
        solver_steps=50,
        solver_tolerance=1e-14,
        evaluate_every=1,
    )
    return RandomQuadratic(
        settings=replace(settings, **overrides),
        upper=[torch.tensor(start, requires_grad=True)],
        lower=[torch.zeros(lower_size, dtype=torch.float64, requires_grad=True)],
        H=torch.tensor(hessian),
        C=torch.tensor(coupling),
        b=torch.tensor(b),
        p=torch.tensor(p),
        q=torch.tensor(q),
    )
