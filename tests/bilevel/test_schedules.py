"""Schedules of the upper searches, whose first trial bounds no later step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import assign, implicit

_w = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)


def _levels(**options: Any) -> tuple[Any, Any, Any]:
    x = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    inner = SLS([y])
    outer: Any = BiSLS([x], lower=inner, **options)

    def lower() -> Any:
        return (y - x).square().sum() + 0.5 * y.square().sum()

    def upper() -> Any:
        return (y - _w).square().sum() + 0.01 * x.square().sum()

    def iterate() -> Any:
        for _ in range(4):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        before = y.detach().clone()
        outer.step(upper)
        return outer.record, y.detach() - before

    return outer, x, iterate


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("lr", [0.05, None])
def test_the_step_taken_is_that_part_of_the_step_found(direction: str, lr: float | None) -> None:
    outer, x, iterate = _levels(direction=direction, lr=lr, momentum=False)
    whole = outer.param_groups[0]["lr"]
    scheduler = lr_scheduler.LambdaLR(outer, lambda k: (1.0, 0.3, 1e-3, 1e-3, 0.1)[k])
    for _ in range(4):
        before, part = x.detach().clone(), outer.param_groups[0]["lr"] / whole
        record, _ = iterate()
        assert record.moved
        assert record.step_size == pytest.approx(part * outer.state["policy"]["previous"])
        assert outer.param_groups[0]["step_size"] == record.step_size
        if direction == "sgd":
            torch.testing.assert_close(x.detach(), before - record.step_size * x.grad)
        scheduler.step()


def test_y_moves_along_by_the_step_taken() -> None:
    """The prediction of y is that of the x that was reached."""
    moved = []
    for factor in (1.0, 0.25):
        outer, _, iterate = _levels(momentum=False, carry=True)
        outer.param_groups[0]["lr"] = factor
        moved.append(iterate()[1])
    assert moved[0].any()
    torch.testing.assert_close(moved[1], 0.25 * moved[0])
