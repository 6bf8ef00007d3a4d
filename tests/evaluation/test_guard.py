"""An exception at any call of a closure leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.helpers import ORIGINAL_BACKWARD, Broken
from tests.optim.helpers import OptimizerInfo, batches, closure_of, every_optimizer, net, run, snapshot


@every_optimizer
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("index", range(4))
def test_an_exception_leaves_everything_as_it_was(
    info: OptimizerInfo, error: type[BaseException], when: str, index: int
) -> None:
    model = net()
    optimizer = info.make(model.parameters(), 1e3, reset="initial") if info.searches else info.make(model.parameters())
    run(optimizer, model, batches(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls = iter(range(100))
    call = -1
    evaluate = closure_of(model, batches(3)[2])

    def fail_inside(*_: Any) -> None:
        if call == index and when == "inside":
            raise error

    model.second.register_forward_pre_hook(fail_inside)  # after buffers were changed and random numbers drawn

    def closure() -> Tensor:
        nonlocal call
        call = next(calls)
        if call == index and when == "before":
            raise error
        loss = evaluate()
        if call == index:
            raise error
        return loss

    before, record = snapshot(model, optimizer), optimizer.record
    try:
        optimizer.step(closure, step_closure=closure)
    except error:
        assert snapshot(model, optimizer) == before
        assert optimizer.record is record
    else:
        assert not info.searches or optimizer.record.trials < 2
        assert next(calls) <= index
    assert torch.autograd.backward is ORIGINAL_BACKWARD
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
