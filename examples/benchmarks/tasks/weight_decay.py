"""Weight decay of a network below, one for each tensor or for each layer, in logarithms.

lower  g(x, y) = cross-entropy of y + 1/2 sum_j exp(x_j) ||y_j||^2     on the training images
upper  f(y)    = cross-entropy of y                                    on other images
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .network import NetworkBelow, network, parts, redraw, settings_of, start

FIRST = -7.0  # logarithm of the weight decay at the start


@dataclass
class WeightDecay(NetworkBelow):
    """`upper` is one tensor of logarithms; `each` tensors of `lower` share one of them."""

    each: int = 1

    def penalty(self) -> Tensor:
        squares = torch.stack([tensor.square().sum() for tensor in self.lower]).unflatten(0, (-1, self.each))
        return (self.upper[0].exp() * squares.sum(1)).sum() / 2

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        return self.losses(batch).mean() + self.penalty()


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    name: str = "digits",
    model: str = "relu-2",
    noise: float = 0.2,
    per_layer: bool = False,
    **overrides: Any,
) -> WeightDecay:
    """Per tensor (weights and biases apart), or per layer; some labels are wrong, so that decay is worth something."""
    (x, y), validation, test = parts(folder, name, model)
    predict, lower = start(seed, network(model, x[0].numel()))
    each = 2 if per_layer else 1
    return WeightDecay(
        settings=settings_of(overrides),
        predict=predict,
        upper=[torch.full((len(lower) // each,), FIRST, requires_grad=True)],
        lower=lower,
        train=(x, redraw(y, noise, seed)),
        validation=validation,
        test=test,
        each=each,
    )
