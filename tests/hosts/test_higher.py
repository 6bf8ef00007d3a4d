"""higher itself, where it is installed: `make test-hosts`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from adaptive_bilevel import BiSLS
from tests.hosts.problem import T_VAL, X_VAL, Problem, T, X

higher: Any = pytest.importorskip("higher")


def test_a_loop_of_higher_is_an_unrolled_loss() -> None:
    """A learned inner learning rate and a learned weight decay."""
    model = Problem().model
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.full((2,), -4.0, requires_grad=True)
    outer = BiSLS([x], direction="adam", hypergradient="direct")

    def upper() -> Tensor:
        with higher.innerloop_ctx(model, inner, override={"lr": [x[0].exp()]}) as (functional, steps):
            for _ in range(5):
                steps.step(mse_loss(functional(X)[:, 0], T) + x[1].exp() * functional.weight.square().sum())
            return mse_loss(functional(X_VAL)[:, 0], T_VAL)

    losses = [float(outer.step(upper)) for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for p in model.parameters())
