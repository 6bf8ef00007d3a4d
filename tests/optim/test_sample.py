"""How long an optimizer keeps the sample of its last step."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import LowerLevelError
from adaptive_bilevel.hypergradient import assign, implicit
from tests.optim.helpers import OptimizerInfo, every_optimizer


@every_optimizer
def test_a_batch_is_freed_by_the_next_step_or_on_demand(info: OptimizerInfo) -> None:
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = info.make([p])

    def step() -> weakref.ref[Tensor]:
        batch = torch.full((2,), 3.0, dtype=torch.float64)
        optimizer.step(lambda: ((p - batch) ** 2).sum())
        return weakref.ref(batch)

    first = step()
    assert first() is not None  # for an upper optimizer, which may be bound to this one yet
    second = step()
    assert first() is None
    optimizer.sample = None
    assert second() is None
    step()  # and it goes on
    assert optimizer.sample is not None


def test_an_upper_optimizer_may_be_made_after_the_lower_steps() -> None:
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)

    def lower() -> Tensor:
        return ((y - x) ** 2).sum()

    def upper() -> Tensor:
        return (y**2).sum()

    inner = SLS([y])
    for _ in range(3):
        inner.step(lower)
    outer = BiSLS([x], lower=inner)
    assign([x], implicit(upper, lower, [x], [y]))
    outer.step(upper)
    assert x.item() < 2.0
    inner.sample = None
    with pytest.raises(LowerLevelError, match="lower_closure"):
        outer.step(upper)
    outer.step(upper, lower)
