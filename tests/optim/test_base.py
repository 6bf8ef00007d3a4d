"""What every single-level optimizer does: it optimizes, and takes a closure, two closures or a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    every_class,
    every_optimizer,
    every_polyak,
    leaf,
    net,
    plain,
    quadratic,
    run,
)


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_decreases_the_loss(info: OptimizerInfo, lr: float | None) -> None:
    x = leaf()
    optimizer = info.make([x], lr)
    first = float(optimizer.step(lambda: quadratic(x)))
    for _ in range(100):
        last = float(optimizer.step(lambda: quadratic(x)))
    assert last < 0.2 * first
    assert optimizer.record.step_size == optimizer.param_groups[0]["step_size"] > 0.0
    assert optimizer.record.describe().startswith("step ")


@every_optimizer
def test_trains_a_network(info: OptimizerInfo) -> None:
    model = net(dropout=0.0)
    losses = run(info.make(model.parameters(), None), model, batches(1) * 40)
    assert losses[-1] < 0.9 * losses[0]


@every_class
def test_closure_is_required(info: OptimizerInfo) -> None:
    optimizer = info.make([leaf()])
    for arguments in ((), (None,), (3.0,)):
        with pytest.raises(ClosureError, match="needs a closure"):
            optimizer.step(*arguments)


@every_class
def test_repr_names_options_and_the_last_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    assert repr(optimizer).startswith(f"{info.cls.__name__}(lr=0.1, ")
    optimizer.step(lambda: quadratic(x))
    assert "step " in repr(optimizer)


@every_class
def test_two_samples(info: OptimizerInfo) -> None:
    x, y = leaf(), leaf()
    optimizer = info.make([x], 0.2)
    optimizer.step(lambda: quadratic(x), step_closure=lambda: quadratic(x - 1.0))
    other = info.make([y], 0.2)
    gradient = torch.autograd.grad(quadratic(y), y)[0]
    other.step(lambda: quadratic(y - 1.0))
    assert repr(optimizer.record) == repr(other.record)
    torch.testing.assert_close(x.detach(), torch.tensor([3.0, 2.0]) - other.record.step_size * gradient)
    assert optimizer.evaluations.lower.gradients == 2
    with pytest.raises(ClosureError, match="needs a closure"):
        optimizer.step(lambda: quadratic(x), step_closure=3)


@every_polyak
@pytest.mark.parametrize(
    "kind", [Tensor.item, lambda loss: loss, lambda loss: loss.detach()], ids=["float", "graph", "bare"]
)
def test_a_loss_in_the_place_of_a_closure(info: OptimizerInfo, kind: Any) -> None:
    x, y = leaf(), leaf()
    one, two = info.make([x]), info.make([y])
    for _ in range(4):
        one.step(lambda: quadratic(x))
        two.zero_grad()
        loss = quadratic(y)
        loss.backward()
        grad = y.grad
        two.step(loss=kind(loss))
        assert y.grad is grad
    assert x.tolist() == y.tolist()
    assert plain(one.state_dict()) == plain(two.state_dict())


@every_polyak
def test_a_wrong_loss_argument(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    quadratic(x).backward()
    for loss in (torch.ones(2), torch.ones((), dtype=torch.complex64), "low"):
        with pytest.raises(ClosureError):
            optimizer.step(loss=loss)
    with pytest.raises(ClosureError, match="one of the two"):
        optimizer.step(lambda: quadratic(x), loss=1.0)
    x.grad = None
    with pytest.raises(ClosureError, match="grad"):
        optimizer.step(loss=1.0)
    assert x.tolist() == [3.0, 2.0]
