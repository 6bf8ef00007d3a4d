"""The sum of two quadratics in the plane: no point minimises both, so there is no interpolation.

f_i(x) = 1/2 (x - x_i*)' H_i (x - x_i*),  H_i = O' Diag(log(1 + l_i)) O,  with O, l_i of P'P and P, x_i* standard normal

Appendix A.1 of Fan et al. (2023), arXiv 2305.18666.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Evaluation, Settings


@dataclass
class TwoQuadratics:
    """A batch is one of the two. "loss" is the sum's value above its least one, "distance" that to its minimizer."""

    settings: Settings
    params: list[Tensor]
    hessians: Tensor
    centres: Tensor

    def loss(self, batch: int) -> Tensor:
        return self._value(self.params[0], batch)

    def _value(self, x: Tensor, batch: int) -> Tensor:
        from_centre = x - self.centres[batch]
        return from_centre @ self.hessians[batch] @ from_centre / 2

    def sample(self, generator: torch.Generator) -> int:
        return int(torch.randint(2, (1,), generator=generator))

    def minimizer(self) -> Tensor:
        right = (self.hessians @ self.centres[..., None]).sum(0)
        return torch.linalg.solve(self.hessians.sum(0), right)[:, 0]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        x, best = self.params[0], self.minimizer()
        above = sum(float(self._value(x, i) - self._value(best, i)) for i in range(2))
        return {"loss": above, "distance": float((x - best).norm()), "x0": float(x[0]), "x1": float(x[1])}


def create(
    seed: int, folder: str | Path | None = None, *, problem: int = 0, start: float = 3.0, **overrides: Any
) -> TwoQuadratics:
    """Problem number `problem`; the seed draws the start, `start` away from the origin."""
    generator = torch.Generator().manual_seed(problem)
    roots = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(roots.mT @ roots)
    angle = 2 * torch.pi * torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    settings = Settings(iterations=500, lower_steps=1, lower_batch=1, evaluate_every=1)
    return TwoQuadratics(
        settings=replace(settings, **overrides),
        params=[torch.cat([start * angle.cos(), start * angle.sin()]).requires_grad_()],
        hessians=vectors @ torch.diag_embed((1 + values).log()) @ vectors.mT,
        centres=torch.randn(2, 2, generator=generator, dtype=torch.float64),
    )
