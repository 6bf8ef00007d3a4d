"""Data hyper-cleaning: the upper level weighs training images, some of which have a label drawn at random.

lower  g(x, y) = mean_i sigmoid(x_i) cross-entropy_i(y) + 1e-3 ||y||^2     on the training images
upper  f(y)    = cross-entropy of y                                        on clean images
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import data
from adaptive_bilevel import SLS

from .base import Evaluation, Settings, append_one, draw, minimizer

SPLITS = {  # rows of the training part: training, validation
    "mnist": (slice(0, 1000), slice(2000, 2500)),
    "fashion_mnist": (slice(0, 1000), slice(2000, 2500)),
    "digits": (slice(0, 500), slice(1000, 1250)),
}


@dataclass
class HyperCleaning:
    """`upper` is one logit per training image, `lower` softmax weights; both start at zero.

    "loss" is f(x, y) at the present y; "resolved_loss" is F(x) = f(x, y*(x)). With few lower steps an upper method can
    lower f by moving y away from y*(x), and only F shows that.
    """

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ridge: float = 1e-3

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(x @ self.lower[0], y)

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        rows = slice(None) if batch is None else batch
        return self._fit(self.upper[0][rows].sigmoid(), self.train[0][rows], self.train[1][rows], self.lower[0])

    def _fit(self, weights: Tensor, x: Tensor, y: Tensor, solution: Tensor) -> Tensor:
        weighted = weights * cross_entropy(x @ solution, y, reduction="none")
        return weighted.mean() + self.ridge * solution.square().sum()

    def sample_upper(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.validation, self.settings.upper_batch, generator)

    def sample_lower(self, generator: torch.Generator) -> Tensor | None:
        size = self.settings.lower_batch
        return torch.randint(len(self.train[1]), (size,), generator=generator) if size else None

    def evaluate(self) -> Evaluation:
        return self._scores(self.lower[0].detach())

    def resolve(self) -> Evaluation:
        weights, (x, y) = self.upper[0].detach().double().sigmoid(), self.train
        solution = minimizer(lambda z: self._fit(weights, x.double(), y, z), self.lower[0])
        return {f"resolved_{key}": value for key, value in self._scores(solution.to(x.dtype)).items()}

    @torch.no_grad()
    def _scores(self, weights: Tensor) -> Evaluation:
        (x, y), (test_x, test_y) = self.validation, self.test
        accuracy = ((test_x @ weights).argmax(1) == test_y).float().mean()
        return {"loss": float(cross_entropy(x @ weights, y)), "accuracy": float(accuracy)}

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return SLS(params, lr=self.settings.lower_lr, reset="grow", grow=1.5, max_step=self.settings.lower_lr)


def create(
    seed: int, folder: str | Path | None = None, *, noise: float = 0.4, name: str = "mnist", **overrides: Any
) -> HyperCleaning:
    """The task; `seed` decides which labels are redrawn."""
    content = data.images(folder, name)
    generator = torch.Generator().manual_seed(seed)
    (train_x, train_y), validation = (
        (append_one(content.x[rows].flatten(1)), content.y[rows]) for rows in SPLITS[content.name]
    )
    redrawn = torch.rand(len(train_y), generator=generator) < noise
    noisy = torch.where(redrawn, torch.randint(10, (len(train_y),), generator=generator), train_y)
    settings = Settings(iterations=100, lower_steps=5, lower_lr=10.0, solver="cg", solver_steps=10)
    return HyperCleaning(
        settings=replace(settings, **overrides),
        upper=[torch.zeros(len(train_y), requires_grad=True)],
        lower=[torch.zeros(train_x.shape[1], 10, requires_grad=True)],
        train=(train_x, noisy),
        validation=validation,
        test=(append_one(content.test_x[:3000].flatten(1)), content.test_y[:3000]),
    )
