"""Parameter groups: one step for all of them, in the ratio of their rates, and what a group may not have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import OptionError, TensorError
from tests.optim.helpers import OptimizerInfo, batches, every_class, every_optimizer, leaf, net, plain, quadratic, run


@every_optimizer
def test_groups_share_one_step(info: OptimizerInfo) -> None:
    x, y = leaf(3.0, 2.0), leaf(1.0, -1.0, 0.5)
    optimizer = info.make([{"params": [x]}, {"params": [y], "lr": 0.025}], 0.1)
    reference = {p: p.detach().clone() for p in (x, y)}
    gradients = {p: torch.autograd.grad(quadratic(p), p)[0] for p in (x, y)}
    optimizer.step(lambda: quadratic(x) + quadratic(y))
    step = optimizer.record.step_size
    adam = info.options.get("direction") == "adam"
    directions = {p: g / (g.abs() + 1e-8) if adam else g for p, g in gradients.items()}
    slope = sum(w * float(gradients[p].flatten() @ directions[p].flatten()) for p, w in ((x, 1.0), (y, 0.25)))
    assert optimizer.record.slope == pytest.approx(slope)
    torch.testing.assert_close(x.detach(), reference[x] - step * directions[x])
    torch.testing.assert_close(y.detach(), reference[y] - step * 0.25 * directions[y])
    assert [g["step_size"] for g in optimizer.param_groups] == [step, step * 0.25]


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_groups_of_equal_lr_are_one_group(info: OptimizerInfo, lr: float | None) -> None:
    one, two = net(dropout=0.0), net(dropout=0.0)
    optimizers = [
        info.make(one.parameters(), lr),
        info.make([{"params": list(two.first.parameters())}, {"params": [*two.norm.parameters()]}], lr),
    ]
    optimizers[1].add_param_group({"params": list(two.second.parameters())})
    for model, optimizer in zip((one, two), optimizers, strict=True):
        run(optimizer, model, batches(5))
    assert plain(one.state_dict()) == plain(two.state_dict())


@every_optimizer
def test_a_group_without_lr_has_that_of_the_first(info: OptimizerInfo) -> None:
    optimizer = info.make([{"params": [leaf()], "lr": 0.5}, {"params": [leaf()]}], None)
    assert [(g["lr"], g["scale"]) for g in optimizer.param_groups] == [(0.5, 1.0), (0.5, 1.0)]


@every_optimizer
def test_add_param_group_later(info: OptimizerInfo) -> None:
    x, y = leaf(), leaf(1.0)
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    optimizer.add_param_group({"params": [y]})
    assert optimizer.param_groups[1]["scale"] == optimizer.param_groups[0]["scale"] > 0.0
    for _ in range(3):
        optimizer.step(lambda: quadratic(x) + quadratic(y))
    assert y.item() != 1.0


@every_optimizer
def test_empty_groups(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([{"params": []}, {"params": [x]}])
    optimizer.step(lambda: quadratic(x))
    assert optimizer.record.step_size > 0.0


@every_class
@pytest.mark.parametrize(
    "group",
    [
        {"c": 0.2},
        {"lr": -1.0},
        {"lr": math.nan},
        {"direction": "adam"},
        {"lower_bound": 1.0},
        {"eps": 1e-3},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
    ],
    ids=lambda g: str(next(iter(g.items()))),
)
def test_a_group_may_only_differ_in_lr(info: OptimizerInfo, group: dict[str, Any]) -> None:
    optimizer = info.make([leaf()])
    before = plain(optimizer.state_dict())
    with pytest.raises(OptionError, match=next(iter(group))):
        optimizer.add_param_group({"params": [leaf()], **group})
    assert plain(optimizer.state_dict()) == before


@every_class
def test_unsupported_parameters_are_refused(info: OptimizerInfo) -> None:
    optimizer = info.make([leaf()])
    bad = [nn.Parameter(torch.zeros(2, dtype=torch.complex64)), nn.Parameter(torch.eye(2).to_sparse())]
    bad.append(nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    for p in bad:
        with pytest.raises(TensorError, match="only dense real floating-point"):
            info.make([p])
        with pytest.raises(TensorError):
            optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
