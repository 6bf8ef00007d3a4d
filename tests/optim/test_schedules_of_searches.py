"""A schedule is a factor of the step taken, also where lr is a first trial and bounds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from adaptive_bilevel import SLS
from tests.optim.helpers import leaf, quadratic

_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=1e-6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=12, cycle_momentum=False),
}


@pytest.mark.parametrize("lr", [0.02, None])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("name", _SCHEDULERS)
def test_the_step_taken_is_that_part_of_the_step_found(name: str, direction: str, lr: float | None) -> None:
    x = leaf()
    optimizer: Any = SLS([x], lr, direction=direction)
    whole = optimizer.param_groups[0]["lr"]
    scheduler = _SCHEDULERS[name](optimizer)
    for _ in range(8):
        before, part = x.detach().clone(), optimizer.param_groups[0]["lr"] / whole
        optimizer.step(lambda: quadratic(x))
        record, found = optimizer.record, optimizer.state["policy"]["previous"]
        assert record.step_size == pytest.approx(part * found)
        assert optimizer.param_groups[0]["step_size"] == record.step_size == optimizer.sample.step_size
        if direction == "sgd":
            (gradient,) = torch.autograd.grad(quadratic(before.requires_grad_()), before)
            torch.testing.assert_close(x.detach(), (before - record.step_size * gradient).detach())
        scheduler.step()


def test_the_search_goes_on_as_if_there_were_no_schedule() -> None:
    """No step grows back to what it was before the schedule fell."""
    x = leaf()
    optimizer: Any = SLS([x])
    scheduler = lr_scheduler.MultiStepLR(optimizer, [3], gamma=1e-4)
    steps = []
    for _ in range(60):
        optimizer.step(lambda: quadratic(x))
        steps.append(optimizer.record.step_size)
        scheduler.step()
    assert max(steps[3:]) < 1e-2 * min(steps[:3])


def test_a_plateau_is_left_with_shorter_steps() -> None:
    x = leaf()
    optimizer: Any = SLS([x], reset="keep", max_step=0.01)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)
    steps = []
    for _ in range(3):
        optimizer.step(lambda: quadratic(x))
        steps.append(optimizer.record.step_size)
        scheduler.step(1.0)
    assert steps[2] == pytest.approx(0.1 * steps[1])


def test_a_factor_above_one_takes_no_step_that_was_not_searched() -> None:
    x = leaf()
    optimizer: Any = SLS([x], 1e-4)
    optimizer.param_groups[0]["lr"] = 10.0
    before = float(quadratic(x).detach())
    optimizer.step(lambda: quadratic(x))
    assert optimizer.record.trials > 1 and float(quadratic(x).detach()) < before
    assert optimizer.record.step_size == optimizer.state["policy"]["previous"]


def test_a_schedule_goes_on_after_loading() -> None:
    points, steps = [leaf(), leaf()], []
    first: Any = SLS([points[0]])
    first.param_groups[0]["lr"] = 0.25
    first.step(lambda: quadratic(points[0]))
    second: Any = SLS([points[1]])
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        points[1].copy_(points[0])
    for optimizer, x in ((first, points[0]), (second, points[1])):
        optimizer.step(lambda x=x: quadratic(x))
        steps.append(optimizer.record.step_size)
    assert steps[0] == steps[1] == pytest.approx(0.25 * first.state["policy"]["previous"])
