"""Data distillation: the upper level paints ten images, the lower level fits a softmax regression to nothing but them.

lower  g(x, y) = cross-entropy of y on the images x, one per class, + 1e-4/2 ||y||^2
upper  f(y)    = cross-entropy of y on real images
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import data

from .base import Evaluation, Settings, append_one, draw, minimizer

SPLITS = {  # rows of the training part: upper level, evaluation
    "mnist": (slice(0, 20_000), slice(20_000, 22_000)),
    "digits": (slice(0, 1200), slice(1200, 1500)),
}


@dataclass
class Distillation:
    """`upper` is 10 x pixels, `lower` is (pixels + 1) x 10; both start at zero, and `lower` stays warm."""

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    validation: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ridge: float = 1e-4

    def predict(self, x: Tensor) -> Tensor:
        return append_one(x) @ self.lower[0]

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(self.predict(x), y)

    def lower_loss(self, batch: None) -> Tensor:
        return self._fit(append_one(self.upper[0]), self.lower[0])

    def _fit(self, images: Tensor, weights: Tensor) -> Tensor:
        return cross_entropy(images @ weights, torch.arange(10)) + self.ridge / 2 * weights.square().sum()

    def sample_upper(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.validation, self.settings.upper_batch, generator)

    def sample_lower(self, generator: torch.Generator) -> None:
        return None

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        x, y = self.test
        accuracy = (self.predict(x).argmax(1) == y).float().mean()
        return {"loss": float(self.upper_loss(self.held_out)), "accuracy": float(accuracy)}

    @torch.no_grad()
    def resolve(self) -> Evaluation:
        """With the fit to the ten images solved."""
        images, present = append_one(self.upper[0]).double(), self.lower[0].clone()
        with torch.enable_grad():
            solution = minimizer(lambda z: self._fit(images, z), present)
        self.lower[0].copy_(solution)
        scores = {f"resolved_{key}": value for key, value in self.evaluate().items()}
        self.lower[0].copy_(present)
        return scores

    def picture(self) -> list[list[float]]:
        """The ten images, row by row."""
        return [[round(value, 3) for value in image.tolist()] for image in self.upper[0].detach()]

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.settings.lower_lr)


def create(seed: int, folder: str | Path | None = None, *, pooled: bool = True, **overrides: Any) -> Distillation:
    """The task, of 14x14 or 28x28 pixels; the seed plays no part in it, since everything starts at zero."""
    content = data.images(folder, pooled=pooled)
    validation, held_out = ((content.x[rows].flatten(1), content.y[rows]) for rows in SPLITS[content.name])
    settings = Settings(
        iterations=400, lower_steps=20, upper_batch=100, lower_lr=0.1,
        solver="neumann", solver_steps=20, solver_scale=0.1,
    )  # fmt: skip
    pixels = validation[0].shape[1]
    return Distillation(
        settings=replace(settings, **overrides),
        upper=[torch.zeros(10, pixels, requires_grad=True)],
        lower=[torch.zeros(pixels + 1, 10, requires_grad=True)],
        validation=validation,
        held_out=held_out,
        test=(content.test_x[:2000].flatten(1), content.test_y[:2000]),
    )
