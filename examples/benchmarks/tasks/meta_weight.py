"""A meta-weight-net: a small upper network maps the loss of a training image to its weight (Shu et al., 2019).

lower  g(x, y) = mean_i V_x(l_i(y)) l_i(y) + ridge/2 ||y||^2,  l_i = cross-entropy of image i
upper  f(y)    = cross-entropy of y                            on clean images

V is differentiated too, unlike in the paper: held constant, it would leave a lower step that no loss has as a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .network import NetworkBelow, Predict, mlp, network, parts, redraw, settings_of, start


@dataclass
class MetaWeight(NetworkBelow):
    """`upper` is the weights of V, whose output goes through a sigmoid."""

    weigh: Predict | None = None

    def lower_loss(self, batch: Tensor | None) -> Tensor:
        assert self.weigh is not None
        losses = self.losses(batch)
        weights = self.weigh(self.upper, losses[:, None])[:, 0].sigmoid()
        return (weights * losses).mean() + self.penalty()


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    name: str = "digits",
    model: str = "relu",
    noise: float = 0.4,
    hidden: int = 32,
    **overrides: Any,
) -> MetaWeight:
    """`hidden` is the width of V; its activation is tanh, so that g is smooth in x."""
    (x, y), validation, test = parts(folder, name, model)
    predict, lower = start(seed, network(model, x[0].numel()))
    weigh, upper = start(seed + 1000, mlp(1, (hidden,), nn.Tanh, classes=1))
    return MetaWeight(
        settings=settings_of(overrides),
        predict=predict,
        upper=upper,
        lower=lower,
        train=(x, redraw(y, noise, seed)),
        validation=validation,
        test=test,
        weigh=weigh,
    )
