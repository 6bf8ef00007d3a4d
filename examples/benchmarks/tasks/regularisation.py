"""Regularisation selection: the upper level chooses penalties, the lower level fits a linear model under them.

lower  g(x, y) = mean_i loss_i(y) + 1/2 sum_j exp(x_j) ||y_j||^2      on training rows; y_j: weights of feature j
upper  f(y)    = mean_i loss_i(y)                                     on other rows

The loss is the squared one ("ridge"), the logistic one, or cross-entropy ("softmax"). Without `per_feature` all
features share one penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import data
from adaptive_bilevel import SLS

from .base import Evaluation, Settings, append_one, draw, minimizer

Part = tuple[Tensor, Tensor]
ROWS = {  # training rows, validation rows
    "a9a": (1000, 1000),
    "news20_small": (500, 500),
    "news20": (5657, 5657),
}


def ridge(output: Tensor, y: Tensor) -> Tensor:
    return (output[:, 0] - y).square().mean() / 2


def logistic(output: Tensor, y: Tensor) -> Tensor:
    return softplus(-y * output[:, 0]).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ridge": ridge, "logistic": logistic, "softmax": cross_entropy}


@dataclass
class Regularisation:
    """`upper` is the logarithm of the penalties, `lower` is features x outputs; both start at zero (penalties 1)."""

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    kind: str
    train: Part
    validation: Part
    test: Part

    def upper_loss(self, batch: Part) -> Tensor:
        return self._loss(batch, self.lower[0])

    def lower_loss(self, batch: Part) -> Tensor:
        return self.penalised(batch, self.upper[0], self.lower[0])

    def _loss(self, batch: Part, weights: Tensor) -> Tensor:
        x, y = batch
        return LOSSES[self.kind](x @ weights, y)

    def penalised(self, batch: Part, penalties: Tensor, weights: Tensor) -> Tensor:
        return self._loss(batch, weights) + (penalties.exp() * weights.square().sum(1)).sum() / 2

    def sample_upper(self, generator: torch.Generator) -> Part:
        return draw(*self.validation, self.settings.upper_batch, generator)

    def sample_lower(self, generator: torch.Generator) -> Part:
        return draw(*self.train, self.settings.lower_batch, generator)

    def evaluate(self) -> Evaluation:
        return self._scores(self.lower[0].detach())

    def resolve(self) -> Evaluation:
        (x, y), penalties = self.train, self.upper[0].detach().double()
        batch = (x.double(), y.double() if y.is_floating_point() else y)
        solution = minimizer(lambda z: self.penalised(batch, penalties, z), self.lower[0])
        return {f"resolved_{key}": value for key, value in self._scores(solution.to(x.dtype)).items()}

    @torch.no_grad()
    def _scores(self, weights: Tensor) -> Evaluation:
        x, y = self.test
        output = x @ weights
        guess = output.argmax(1) if self.kind == "softmax" else output[:, 0].sign()
        return {
            "loss": float(self._loss(self.validation, weights)),
            "test_loss": float(LOSSES[self.kind](output, y)),
            "accuracy": float((guess == y).float().mean()),
        }

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return SLS(params)


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    name: str = "a9a",
    kind: str = "logistic",
    per_feature: bool = True,
    **overrides: Any,
) -> Regularisation:
    """The task; the seed draws which rows are for training and for validation."""
    read = data.words if name.startswith("news20") else data.classification
    (x, y), test = read(name, folder)
    assert test is not None, f"{name} has no test part"
    sizes = ROWS[name] if data.folder(folder) else (len(x) // 4, len(x) // 4)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rows, others = order[: sizes[0]], order[sizes[0] : sum(sizes)]
    features, outputs = x.shape[1] + 1, int(y.max()) + 1 if kind == "softmax" else 1
    settings = Settings(iterations=100, lower_steps=10, solver="cg", solver_steps=10)
    return Regularisation(
        settings=replace(settings, **overrides),
        upper=[torch.zeros(features if per_feature else 1, requires_grad=True)],
        lower=[torch.zeros(features, outputs, requires_grad=True)],
        kind=kind,
        train=(append_one(x[rows]), y[rows]),
        validation=(append_one(x[others]), y[others]),
        test=(append_one(test[0]), test[1]),
    )
