"""Steps that do not move: no gradient, no sufficient decrease, a loss below its bound, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.errors import AdaptiveBilevelWarning, NonFiniteError
from adaptive_bilevel.policies import Outcome
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    closure_of,
    every_class,
    every_optimizer,
    every_polyak,
    every_search,
    leaf,
    net,
    plain,
    quadratic,
    run,
    snapshot,
)


@every_class
def test_zero_gradient_touches_nothing(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    before, state = x.tolist(), plain(optimizer.state_dict())
    optimizer.step(lambda: 0.0 * quadratic(x) + 1.0)
    assert optimizer.record.outcome == Outcome.zero_gradient
    assert x.tolist() == before
    assert plain(optimizer.state_dict()) == state


@every_search
def test_a_failed_search_leaves_everything_and_warns_rarely(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], 1.0)

    def rising() -> Tensor:
        return 2.0 * quadratic(x.detach()) - quadratic(x)  # the gradient of -f, with the value of f

    state = plain(optimizer.state_dict())
    with pytest.warns(AdaptiveBilevelWarning, match="no trial step") as caught:
        for _ in range(12):
            optimizer.step(rising)
    assert len(caught) == 2  # the 1st and the 10th
    assert optimizer.record.outcome == Outcome.search_failed
    assert x.tolist() == [3.0, 2.0]
    assert plain(optimizer.state_dict()) == state


@every_polyak
def test_a_loss_below_its_lower_bound_warns(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    with pytest.warns(AdaptiveBilevelWarning, match="lower_bound="):
        optimizer.step(lambda: quadratic(x) - 1e3)
    assert x.tolist() == [3.0, 2.0]


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_moves_nothing_and_raises_after_max_skips(info: OptimizerInfo, bad: float, where: str) -> None:
    model = net()
    optimizer = info.make(model.parameters(), None, max_skips=3)
    run(optimizer, model, batches(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    batch = batches(1)[0]

    def poisoned() -> Tensor:
        loss = closure_of(model, batch)()
        if where == "loss":
            return loss * bad
        return loss + (model.first.weight - model.first.weight.detach()).sum() * bad

    if where == "gradient":
        # The value stays finite: 0 * inf would be NaN, so the gradient is spoilt by a hook.
        def poisoned() -> Tensor:
            loss = closure_of(model, batch)()
            if loss.requires_grad:
                loss.register_hook(lambda g: g * bad)
            return loss

    before = snapshot(model, optimizer)
    for _ in range(2):
        optimizer.step(poisoned)
        assert optimizer.record.outcome == Outcome.non_finite
        assert snapshot(model, optimizer) == before
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        optimizer.step(poisoned)
    assert snapshot(model, optimizer) == before
    run(optimizer, model, batches(1))  # and it can go on
    optimizer.step(poisoned)


@every_optimizer
@pytest.mark.parametrize("which", ["closure", "step_closure"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_in_either_of_two_samples(info: OptimizerInfo, which: str, where: str) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    good = closure_of(model, batches(2)[0])

    def poisoned() -> Tensor:
        loss = closure_of(model, batches(2)[1])()
        if where == "loss":
            return loss * math.nan
        if loss.requires_grad:
            loss.register_hook(lambda g: g * math.inf)
        return loss

    before = snapshot(model, optimizer)
    closures = {"closure": good, "step_closure": good, which: poisoned}
    optimizer.step(**closures)
    assert optimizer.record.outcome == Outcome.non_finite
    assert snapshot(model, optimizer) == before


@every_search
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_trial_is_rejected(info: OptimizerInfo, bad: float) -> None:
    x = leaf()
    optimizer = info.make([x], 0.01)
    calls = iter(range(100))

    def closure() -> Tensor:
        return quadratic(x) if next(calls) != 1 else quadratic(x) * 0 + bad

    optimizer.step(closure)
    assert optimizer.record.trials == 2
    assert optimizer.record.step_size == pytest.approx(0.005)
