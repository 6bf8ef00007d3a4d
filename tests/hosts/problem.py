"""One penalty per feature of a regression: what the tests of the trainers train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import implicit

DATA = torch.randn(2, 40, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
(X, T), (X_VAL, T_VAL) = ((part[:, :20], part[:, :5].sum(1) + part[:, 20]) for part in DATA)


class Problem(nn.Module):
    """Both levels' losses as methods of a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(20, 1)
        self.decay = nn.Parameter(torch.full((20,), -4.0))

    def lower(self) -> Tensor:
        return mse_loss(self.model(X)[:, 0], T) + (self.decay.exp() * self.model.weight**2).sum() / 2

    def upper(self) -> Tensor:
        return mse_loss(self.model(X_VAL)[:, 0], T_VAL)


def optimizers(problem: Any) -> tuple[SLS, BiSLS]:
    inner = SLS(problem.model.parameters())
    return inner, BiSLS([problem.decay], lower=inner, direction="adam", hypergradient=implicit)


def plainly(steps: int, lower_steps: int = 5) -> tuple[Problem, BiSLS]:
    """Return the problem after upper steps in a loop of one's own."""
    problem = Problem()
    inner, outer = optimizers(problem)
    for _ in range(steps):
        for _ in range(lower_steps):
            inner.step(problem.lower)
        outer.step(problem.upper)
    return problem, outer
