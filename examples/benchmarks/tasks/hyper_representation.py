"""Hyper-representation: the upper level learns an embedding, the lower level a ridge regression on top of it.

lower  g(x, y) = 1/(2n) sum ||y' phi_x(a) - onehot||^2 + lambda/2 ||y||^2     on training images
upper  f(x, y) = 1/(2n) sum ||y' phi_x(a) - onehot||^2                        on other images
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from adaptive_bilevel import SLS

from .base import Evaluation, Settings, append_one, draw, lenet, uniform_layers

SPLITS = {  # rows of the training part: lower level, upper level, evaluation
    "mnist": (slice(0, 10_000), slice(10_000, 20_000), slice(20_000, 22_000)),
    "digits": (slice(0, 600), slice(600, 1200), slice(1200, 1500)),
}


@dataclass
class HyperRepresentation:
    """Squared loss on one-hot labels; `lower` is one matrix that starts at zero and stays warm."""

    settings: Settings
    network: nn.Module
    upper: list[Tensor]
    lower: list[Tensor]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ridge: float = 1e-3

    def predict(self, x: Tensor) -> Tensor:
        return append_one(self.network(x)) @ self.lower[0]

    def _fit(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.predict(x) - nn.functional.one_hot(y, 10)).square().sum() / (2 * len(x))

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._fit(batch)

    def lower_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._fit(batch) + self.ridge / 2 * self.lower[0].square().sum()

    def sample_upper(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.validation, self.settings.upper_batch, generator)

    def sample_lower(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.train, self.settings.lower_batch, generator)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        x, y = self.test
        accuracy = (self.predict(x).argmax(1) == y).float().mean()
        return {"loss": float(self._fit(self.held_out)), "accuracy": float(accuracy)}

    @torch.no_grad()
    def resolve(self) -> Evaluation:
        """With the ridge regression solved on all training images."""
        x, y = self.train
        features = torch.cat([append_one(self.network(part)) for part in x.split(1000)]).double()
        targets, present = nn.functional.one_hot(y, 10).double(), self.lower[0].clone()
        gram = features.T @ features / len(x) + self.ridge * torch.eye(features.shape[1], dtype=torch.float64)
        self.lower[0].copy_(torch.linalg.solve(gram, features.T @ targets / len(x)))
        scores = {f"resolved_{key}": value for key, value in self.evaluate().items()}
        self.lower[0].copy_(present)
        return scores

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return SLS(params, lr=self.settings.lower_lr, reset="initial")


def mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU())


def create(
    seed: int, folder: str | Path | None = None, *, convolutional: bool = False, **overrides: Any
) -> HyperRepresentation:
    """The task for one seed; `convolutional` takes LeNet on 28x28 and its settings."""
    content = data.images(folder, pooled=not convolutional)
    size = 128 if convolutional or content.name == "digits" else 256
    settings = Settings(
        iterations=120 if convolutional else 200,
        lower_steps=10, upper_batch=size, lower_batch=size, lower_lr=100.0,
        solver="cg", solver_steps=3,
    )  # fmt: skip
    network = lenet() if convolutional else mlp(content.x[0].numel())
    uniform_layers(network, torch.Generator().manual_seed(seed))
    features = 84 if convolutional else 48
    train, validation, held_out = ((content.x[rows], content.y[rows]) for rows in SPLITS[content.name])
    return HyperRepresentation(
        settings=replace(settings, **overrides),
        network=network,
        upper=list(network.parameters()),
        lower=[torch.zeros(features + 1, 10, requires_grad=True)],
        train=train,
        validation=validation,
        held_out=held_out,
        test=(content.test_x[:2000], content.test_y[:2000]),
    )
