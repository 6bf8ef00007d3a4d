"""Schedules with any exponent, and a cap of one step on a bounded search."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import SLSB, Constant, PowerDecay


@pytest.mark.parametrize(("cap", "step"), [(0.2, 0.2), (10.0, 0.5), (None, 0.5)])
def test_a_cap_of_one_step_also_bounds_slsb(cap: float | None, step: float) -> None:
    policy = SLSB(bound=0.5, decay="constant", lower_bound=None)
    record, _ = policy.step(policy.init(), loss=1.0, slope=1.0, trial=lambda a: 1.0 - a, cap=cap)
    assert record.step_size == step
    assert record.bound == step


def test_power_decay() -> None:
    policy, state = Constant(bound=2.0, decay=PowerDecay(0.4)), Constant(bound=2.0).init()
    for k in range(5):
        record, state = policy.step(state, loss=1.0, slope=1.0)
        assert record.step_size == pytest.approx(2.0 * (k + 1) ** -0.4)
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), "0.5"])
def test_power_decay_refuses(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"PowerDecay\(exponent="):
        PowerDecay(wrong)
