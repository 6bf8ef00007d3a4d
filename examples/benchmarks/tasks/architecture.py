"""Architecture search as in DARTS (Liu et al., 2019): a cell whose edges mix candidate operations by a softmax of x.

lower  g(x, y) = cross-entropy of the network with weights y + ridge/2 ||y||^2     on the training images
upper  f(x, y) = cross-entropy of the same network                                on other images
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import uniform_layers
from .network import NetworkBelow, parts, settings_of

CHANNELS = 6
EDGES = ((0, 1), (0, 2), (1, 2))  # between the nodes of the cell


class Cell(nn.Module):
    """A stem of stride 2, three nodes with all edges between them, a linear layer on the last one, pooled to 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1)
        self.edges = nn.ModuleList(
            nn.ModuleList([
                nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()),
                nn.AvgPool2d(3, stride=1, padding=1),
                nn.Identity(),
            ])
            for _ in EDGES
        )  # fmt: skip
        self.head = nn.Linear(CHANNELS * 4, 10)
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        nodes = [self.stem(x[:, None]), 0.0, 0.0]
        for (begin, end), operations, mixture in zip(EDGES, self.edges, logits.softmax(1), strict=True):
            assert isinstance(operations, nn.ModuleList)
            mixed = sum(share * operation(nodes[begin]) for share, operation in zip(mixture, operations, strict=True))
            nodes[end] = nodes[end] + mixed
        output: Tensor = self.head(self.pool(nodes[2]).flatten(1))
        return output


@dataclass
class Architecture(NetworkBelow):
    """`upper` is edges x operations (3x3 and 1x1 convolution, average, identity), all at zero at first."""

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        return self.losses(batch).mean() + self.penalty()


def create(seed: int, folder: str | Path | None = None, *, name: str = "digits", **overrides: Any) -> Architecture:
    """One cell on small images."""
    train, validation, test = parts(folder, name)
    module = Cell()
    uniform_layers(module, torch.Generator().manual_seed(seed))
    names = [key for key, _ in module.named_parameters()]
    upper = [torch.zeros(len(EDGES), 4, requires_grad=True)]

    def predict(weights: list[Tensor], x: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, task.upper[0]))

    task = Architecture(
        settings=settings_of(overrides),
        predict=predict,
        upper=upper,
        lower=[tensor.detach().clone().requires_grad_() for tensor in module.parameters()],
        train=train,
        validation=validation,
        test=test,
    )
    return task
