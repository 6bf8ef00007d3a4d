"""Trials draw the same random numbers, and the random state after a step is that of its first evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.optim.helpers import OptimizerInfo, every_search, net


@every_search
def test_all_trials_see_the_same_mask_and_the_next_step_another(info: OptimizerInfo) -> None:
    model = net()
    masks: list[list[Any]] = []
    model.dropout.register_forward_hook(lambda m, a, out: masks[-1].append((out != 0).tolist()))
    optimizer = info.make(model.parameters(), 1e4, lower_bound=None, reset="initial")
    for _ in range(3):
        masks.append([])
        optimizer.step(lambda: model(torch.ones(16, 6) + torch.arange(16.0)[:, None]).square().mean())
    ones = nn.Dropout(0.5)
    x = nn.Parameter(torch.ones(64))
    drawn: list[list[Tensor]] = []

    def closure() -> Tensor:
        out = ones(torch.ones(64))
        drawn[-1].append(out)
        return ((x * out) ** 2).sum()

    optimizer = info.make([x], 1e3, lower_bound=None, reset="initial")
    for _ in range(3):
        drawn.append([])
        optimizer.step(closure)
        assert len(drawn[-1]) > 2
        assert all(torch.equal(out, drawn[-1][0]) for out in drawn[-1])
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[1][0], drawn[2][0])


@every_search
def test_random_state_is_that_of_the_first_evaluation_alone(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1.0)

    def closure() -> Tensor:
        torch.rand(1 if torch.is_grad_enabled() else 5)  # trials draw more
        return (x**2).sum()

    torch.manual_seed(0)
    torch.rand(1)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)
