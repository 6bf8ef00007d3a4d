"""Label noise with a network below: the upper level weighs training images, some of which have a wrong label.

lower  g(x, y) = mean_i sigmoid(x_i) cross-entropy_i(y) + ridge/2 ||y||^2     on the training images
upper  f(y)    = cross-entropy of y                                          on clean images
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .network import NetworkBelow, network, parts, redraw, settings_of, start


@dataclass
class LabelNoise(NetworkBelow):
    """`upper` is one logit per training image, all at zero at first."""

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        weights = self.upper[0][self.rows(batch)].sigmoid()
        return (weights * self.losses(batch)).mean() + self.penalty()


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    name: str = "digits",
    model: str = "relu",
    noise: float = 0.4,
    **overrides: Any,
) -> LabelNoise:
    """`seed` decides the labels and the first weights; `model` is a name of `network.network`."""
    (x, y), validation, test = parts(folder, name, model)
    predict, lower = start(seed, network(model, x[0].numel()))
    return LabelNoise(
        settings=settings_of(overrides),
        predict=predict,
        upper=[torch.zeros(len(y), requires_grad=True)],
        lower=lower,
        train=(x, redraw(y, noise, seed)),
        validation=validation,
        test=test,
    )
