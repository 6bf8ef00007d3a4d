"""Label smoothing and input noise of a network below.

lower  g(x, y) = cross-entropy of y at a_i + exp(v) e_i against (1 - s) onehot + s/10, + ridge/2 ||y||^2
upper  f(y)    = cross-entropy of y                                                        on clean images

x is the logits of s, one for each class, and v, the logarithm of the noise. The draws e_i are made once, so that g is
one function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .network import NetworkBelow, network, parts, redraw, settings_of, start

FIRST = (-4.0, -3.0)  # logits of the smoothing, logarithm of the noise


@dataclass
class Smoothing(NetworkBelow):
    """`upper` is the ten logits and the logarithm of the noise."""

    draws: Tensor = field(default_factory=lambda: torch.zeros(0))

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        rows = self.rows(batch)
        (x, y), smoothing = (part[rows] for part in self.train), self.upper[0].sigmoid()
        output = self.predict(self.lower, x + self.upper[1].exp() * self.draws[rows]).log_softmax(1)
        share = smoothing[y][:, None]
        targets = (1 - share) * one_hot(y, 10) + share / 10
        return -(targets * output).sum(1).mean() + self.penalty()


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    name: str = "digits",
    model: str = "relu",
    noise: float = 0.2,
    **overrides: Any,
) -> Smoothing:
    """A share `noise` of the training labels is wrong, so that smoothing is worth something."""
    (x, y), validation, test = parts(folder, name, model)
    predict, lower = start(seed, network(model, x[0].numel()))
    smoothing, deviation = FIRST
    return Smoothing(
        settings=settings_of(overrides),
        predict=predict,
        upper=[torch.full((10,), smoothing, requires_grad=True), torch.full((1,), deviation, requires_grad=True)],
        lower=lower,
        train=(x, redraw(y, noise, seed)),
        validation=validation,
        test=test,
        draws=torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 2000)),
    )
