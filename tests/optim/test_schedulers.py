"""The rate lr is a number from the start, and the schedulers of torch scale the step with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, DecSPS
from tests.optim.helpers import OptimizerInfo, every_class, every_optimizer, leaf, plain, quadratic


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_lr_is_a_number_from_construction_on(info: OptimizerInfo, lr: float | None) -> None:
    optimizer = info.make([leaf()], lr)
    assert optimizer.param_groups[0]["lr"] == (lr or 1.0)
    for scheduler in (
        lr_scheduler.StepLR(optimizer, 1),
        lr_scheduler.LambdaLR(optimizer, lambda k: 1.0),
        lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10),
        lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ):
        optimizer.step(lambda: quadratic(optimizer.param_groups[0]["params"][0]))
        scheduler.step()
        assert math.isfinite(optimizer.param_groups[0]["lr"])


@every_class
@pytest.mark.parametrize("lr", [1e-4, None])
def test_a_scheduler_scales_the_bound(info: OptimizerInfo, lr: float | None) -> None:
    if info.cls in (SLS, AutoSLS):
        pytest.skip("lr is the first trial only")
    options: dict[str, Any] = {} if info.searches or info.cls is DecSPS else {"decay": "constant"}
    bounds = []
    for factor in (1.0, 0.5):
        x = leaf()
        optimizer = info.make([x], lr, lower_bound=-50.0, **options)  # far below: the bound is what acts
        scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=factor)
        for _ in range(4):
            optimizer.step(lambda: quadratic(x))
            scheduler.step()
        optimizer.step(lambda: quadratic(x))
        bounds.append(optimizer.record.bound)
    if info.cls in (DecSPS, SLSB) and lr is None:
        assert bounds[1] < 0.5 * bounds[0]
    else:
        assert bounds[1] == pytest.approx(0.25 * bounds[0])


def test_a_scheduler_scales_the_step_that_sls_finds_from_its_first_trial() -> None:
    for lr, x in ((0.1, leaf()), (None, leaf())):
        optimizer: Any = SLS([x], lr, reset="initial", lower_bound=0.0)
        scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=1e-3)
        optimizer.step(lambda: quadratic(x))
        scheduler.step()
        optimizer.step(lambda: quadratic(x))
        found = (lr or 1.0) * optimizer.param_groups[0]["scale"] * 0.5 ** (optimizer.record.trials - 1)
        found = min(found, optimizer.record.bound * 0.5 ** (optimizer.record.trials - 1))
        assert optimizer.record.step_size == pytest.approx(1e-3 * found, rel=1e-12)


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_warm_up_starts_at_zero(info: OptimizerInfo, lr: float | None) -> None:
    x = leaf()
    optimizer = info.make([x], lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: min(k / 2, 1.0))
    before = plain(optimizer.state)
    optimizer.step(lambda: quadratic(x))
    assert x.tolist() == [3.0, 2.0]
    assert optimizer.record.step_size == 0.0
    assert plain(optimizer.state) == before
    scheduler.step()
    optimizer.step(lambda: quadratic(x))
    assert optimizer.record.step_size > 0.0
    full, y = info.make([leaf()], lr), x
    y = full.param_groups[0]["params"][0]
    full.step(lambda: quadratic(y))
    if info.cls not in (SLS, AutoSLS):
        assert optimizer.record.bound == pytest.approx(0.5 * full.record.bound)


def test_one_cycle_moves_beta1() -> None:
    x = leaf()
    optimizer = SPSB([x], 0.1, direction="adam")
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.7)
    optimizer.step(lambda: quadratic(x))
    gradient = 2 * torch.tensor([1.0, 4.0]) * torch.tensor([3.0, 2.0])
    torch.testing.assert_close(optimizer.state[x]["direction"]["exp_avg"], gradient * (1 - 0.7))
