"""A reduced number of the interrupts of `tests.interrupts`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, AutoSLS
from adaptive_bilevel.evaluation import interception
from tests.interrupts import survey


@pytest.mark.filterwarnings("ignore::adaptive_bilevel.errors.AdaptiveBilevelWarning")
def test_a_process_survives_interrupts() -> None:
    made, wrong = survey(60, seed=1)
    assert made > 50 and not wrong


@pytest.mark.parametrize("cls", [SLS, SLSB, AutoSLS], ids=lambda c: c.__name__)
def test_a_closure_that_moves_a_parameter_and_raises_is_undone(cls: Any) -> None:
    x, y = (torch.tensor([v, 2.0], dtype=torch.float64, requires_grad=True) for v in (1.0, 3.0))
    inner = cls([y])
    inner.step(lambda: ((y - x) ** 2).sum())
    before, rng = [x.detach().clone(), y.detach().clone()], torch.get_rng_state()

    def closure() -> Tensor:
        torch.rand(1)
        with torch.no_grad():
            y.add_(1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inner.step(closure)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and torch.equal(torch.get_rng_state(), rng)


def test_a_lock_that_an_interrupt_has_left_is_taken_over() -> None:
    backward = torch.autograd.backward
    y = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = SLS([y])
    interception.installed._lock.acquire()
    for _ in range(3):
        optimizer.step(lambda: (y**2).sum())
    assert torch.autograd.backward is backward and not interception.installed._lock.locked()
