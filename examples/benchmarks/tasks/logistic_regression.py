"""Single-level logistic regression, where the stochastic step-size rules can be compared without a second level.

loss(w) = mean softplus(-y_i <w, a_i>) without a regulariser, from w = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import data

from .base import Evaluation, Settings, draw, minimizer

# Least full losses, by L-BFGS in float64 (see `least_loss`).
OPTIMA = {"w8a": 0.110811, "a9a": 0.322621, "phishing": 0.141597, "mushrooms": 0.0}


@dataclass
class LogisticRegression:
    """One level: `params` and a loss. "loss" is the full loss above the least one (0 where that is not known)."""

    settings: Settings
    params: list[Tensor]
    x: Tensor
    y: Tensor
    optimum: float = 0.0

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return softplus(-y * (x @ self.params[0])).mean()

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(self.x, self.y, self.settings.lower_batch, generator)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        accuracy = ((self.x @ self.params[0] > 0) == (self.y > 0)).float().mean()
        return {"loss": float(self.loss((self.x, self.y))) - self.optimum, "accuracy": float(accuracy)}


def create(
    seed: int, folder: str | Path | None = None, *, name: str = "w8a", epochs: int = 10, **overrides: Any
) -> LogisticRegression:
    """The task on one of the sets of `data.classification`; batches of 100 for `epochs` passes over the rows."""
    (x, y), _ = data.classification(name, folder)
    per_epoch = len(x) / 100
    settings = Settings(
        iterations=int(epochs * per_epoch), lower_steps=1, lower_batch=100, evaluate_every=int(per_epoch)
    )
    return LogisticRegression(
        settings=replace(settings, **overrides),
        params=[torch.zeros(x.shape[1], requires_grad=True)],
        x=x,
        y=y,
        optimum=OPTIMA.get(name, 0.0) if data.folder(folder) else 0.0,
    )


def least_loss(task: LogisticRegression) -> float:
    """The least full loss; how the entries of `OPTIMA` were found."""
    x, y = task.x.double(), task.y.double()

    def loss(w: Tensor) -> Tensor:
        return softplus(-y * (x @ w)).mean()

    return float(loss(minimizer(loss, task.params[0], 2000)))
