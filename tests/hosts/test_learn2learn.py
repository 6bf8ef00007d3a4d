"""learn2learn itself, where it is installed. Its last release does not build on current Pythons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from adaptive_bilevel import BiSLS

algorithms: Any = pytest.importorskip("learn2learn.algorithms.maml")
sgd: Any = pytest.importorskip("learn2learn.algorithms.meta_sgd")


@pytest.mark.parametrize("wrap", [algorithms.MAML, sgd.MetaSGD], ids=["MAML", "MetaSGD"])
def test_a_meta_batch_is_an_unrolled_loss(wrap: Any) -> None:
    torch.manual_seed(0)
    inputs = torch.linspace(-1.0, 1.0, 12)[:, None]
    tasks = [(inputs, amplitude * inputs + 0.3) for amplitude in (0.8, 1.0, 1.3)]
    learned = wrap(nn.Linear(1, 1), lr=0.1)
    outer = BiSLS(learned.parameters(), direction="adam", hypergradient="direct")

    def meta_loss() -> Tensor:
        losses = []
        for x, t in tasks:
            learner = learned.clone()
            learner.adapt(mse_loss(learner(x[::2]), t[::2]))
            losses.append(mse_loss(learner(x[1::2]), t[1::2]))
        return torch.stack(losses).mean()

    losses = [float(outer.step(meta_loss)) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
