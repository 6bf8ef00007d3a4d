"""What the tasks with a network below share: y is its weights, f the cross-entropy on clean validation images.

A task of this kind derives `NetworkBelow` and writes its `lower_loss`. Networks are called with a list of tensors, so
that the losses read `lower` from its list.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import data
from adaptive_bilevel import SLS, AutoSLS

from .base import Evaluation, Settings, draw, lenet, uniform_layers

RESOLVING = 200  # lower steps on the full batch, after which F(x) is read
SPLITS = {  # rows of the training part: training, validation; LeNet takes fewer
    "mnist": (slice(0, 1000), slice(2000, 2500)),
    "fashion_mnist": (slice(0, 1000), slice(2000, 2500)),
    "digits": (slice(0, 500), slice(1000, 1250)),
}
LENET_ROWS = 500
TESTED = 2000
Predict = Callable[[list[Tensor], Tensor], Tensor]


@dataclass
class NetworkBelow(abc.ABC):
    """`lower` is the weights of the network, which start at random and stay warm.

    "loss" is f(x, y) at the present y. "resolved_loss" is F after 200 more lower steps on the full batch from there:
    a network's lower problem has no minimizer to solve for.
    """

    settings: Settings
    predict: Predict
    upper: list[Tensor]
    lower: list[Tensor]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ridge: float = 1e-3

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(self.predict(self.lower, x), y)

    @abc.abstractmethod
    def lower_loss(self, batch: Tensor | None) -> Tensor:
        """g(x, y) on a lower batch."""

    def rows(self, batch: Tensor | None) -> Tensor | slice:
        """The training rows of a lower batch."""
        return slice(None) if batch is None else batch

    def losses(self, batch: Tensor | None) -> Tensor:
        """The cross-entropy of each training row."""
        x, y = (part[self.rows(batch)] for part in self.train)
        return cross_entropy(self.predict(self.lower, x), y, reduction="none")

    def penalty(self) -> Tensor:
        squares = sum(tensor.square().sum() for tensor in self.lower)
        assert isinstance(squares, Tensor)  # there are weights
        return self.ridge / 2 * squares

    def sample_upper(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw(*self.validation, self.settings.upper_batch, generator)

    def sample_lower(self, generator: torch.Generator) -> Tensor | None:
        size = self.settings.lower_batch
        return torch.randint(len(self.train[1]), (size,), generator=generator) if size else None

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        x, y = self.test
        accuracy = (self.predict(self.lower, x).argmax(1) == y).float().mean()
        return {"loss": float(self.upper_loss(self.validation)), "accuracy": float(accuracy)}

    def resolve(self) -> Evaluation:
        present = [tensor.detach().clone() for tensor in self.lower]
        rule = SLS(self.lower)
        for _ in range(RESOLVING):
            rule.step(lambda: self.lower_loss(None))
        scores = {f"resolved_{key}": value for key, value in self.evaluate().items()}
        with torch.no_grad():
            for tensor, before in zip(self.lower, present, strict=True):
                tensor.copy_(before)
        return scores

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return AutoSLS(params)


def settings_of(overrides: dict[str, Any], *, lower_batch: int = 0) -> Settings:
    """T = 10 from the y before, 60 iterations, the package's own solver; each lower step has a minibatch of its own."""
    chosen: dict[str, Any] = {"lower_batch": lower_batch, "upper_batch": lower_batch, **overrides}
    common: dict[str, Any] = {"iterations": 60, "lower_steps": 10, "solver": "default", "solver_scale": 0.1}
    return Settings(**{**common, "fresh_lower_batches": bool(chosen["lower_batch"]), **chosen})


def start(seed: int, module: nn.Module) -> tuple[Predict, list[Tensor]]:
    """The module as a function of its weights, and the weights, drawn from the seed."""
    uniform_layers(module, torch.Generator().manual_seed(seed))
    names = [name for name, _ in module.named_parameters()]

    def predict(weights: list[Tensor], x: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    return predict, [tensor.detach().clone().requires_grad_() for tensor in module.parameters()]


def mlp(inputs: int, hidden: tuple[int, ...], activation: type[nn.Module], classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers += [nn.Linear(inputs, size), activation()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def network(model: str, inputs: int) -> nn.Module:
    """The lower networks by name."""
    if model == "relu":
        return mlp(inputs, (32,), nn.ReLU)
    if model == "relu-2":
        return mlp(inputs, (32, 32), nn.ReLU)
    if model == "tanh":
        return mlp(inputs, (32, 32), nn.Tanh)
    if model == "lenet":
        return lenet(10)
    raise ValueError(f"model={model!r}: choose 'relu', 'relu-2', 'tanh' or 'lenet'.")


def parts(
    folder: str | Path | None, name: str, model: str = ""
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training, validation and test images of a set; 28x28 for LeNet, without a channel."""
    content = data.images(folder, name, pooled=model != "lenet")
    train, validation = ((content.x[rows], content.y[rows]) for rows in SPLITS[content.name])
    if model == "lenet":
        train = (train[0][:LENET_ROWS], train[1][:LENET_ROWS])
    return train, validation, (content.test_x[:TESTED], content.test_y[:TESTED])


def redraw(y: Tensor, share: float, seed: int) -> Tensor:
    """The labels with a share of them drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(y), generator=generator) < share
    return torch.where(chosen, torch.randint(10, (len(y),), generator=generator), y)
