"""Single-level training of LeNet: cross-entropy on minibatches of MNIST or Fashion-MNIST, in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import data

from .base import Evaluation, Settings, draw, lenet, uniform_layers


@dataclass
class ImageClassification:
    """One network; "loss" is that of the first training images, "test_loss" and "accuracy" are of test images."""

    settings: Settings
    network: nn.Module
    params: list[Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(self.network(x), y)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.train, self.settings.lower_batch, generator)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        (x, y), (test_x, test_y) = self.train, self.test
        output = self.network(test_x)
        return {
            "loss": float(self.loss((x[:EVALUATED], y[:EVALUATED]))),
            "test_loss": float(cross_entropy(output, test_y)),
            "accuracy": float((output.argmax(1) == test_y).float().mean()),
        }


EVALUATED = 2000


def create(
    seed: int, folder: str | Path | None = None, *, name: str = "mnist", rows: int = 8000, **overrides: Any
) -> ImageClassification:
    """LeNet-5 from one seed, on `rows` training images; 3 passes over them in batches of 128."""
    content = data.images(folder, name, pooled=False)
    network = lenet(classes=10)
    uniform_layers(network, torch.Generator().manual_seed(seed))
    x, y = content.x[:rows], content.y[:rows]
    settings = Settings(iterations=3 * len(x) // 128, lower_steps=1, lower_batch=128, evaluate_every=20)
    return ImageClassification(
        settings=replace(settings, **overrides),
        network=network,
        params=list(network.parameters()),
        train=(x, y),
        test=(content.test_x[:EVALUATED], content.test_y[:EVALUATED]),
    )
