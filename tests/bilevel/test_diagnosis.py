"""What limits a run: a slope that is far from what the hypergradient promised is reported once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from adaptive_bilevel.bilevel import Taken
from adaptive_bilevel.bilevel.diagnosis import SlopeDiagnosis
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.state import advanced
from adaptive_bilevel.policies import Outcome, Record


def messages(ratios: Sequence[float], comparable: bool = True) -> list[int]:
    """The steps in which there is a message."""
    role, found = SlopeDiagnosis(), []
    state = role.init()
    for k, ratio in enumerate(ratios):
        taken = Taken(Record(1.0, 1.0, 1.0, Outcome.accepted, slope_ratio=ratio), comparable, CG())
        text = role.propose(taken, state)
        state = advanced(state, role.commit(taken, text, state))
        found += [k] * len(text)
        assert all("disagree" in line and "hypergradient.check" in line for line in text)
    return found


@pytest.mark.parametrize("far", [-1.0, 0.49, 2.01, 1e9])
def test_twenty_steps_in_a_row(far: float) -> None:
    assert messages([far] * 60) == [19]
    assert messages([far] * 19 + [1.0] + [far] * 19) == []
    assert messages([far] * 10 + [math.nan] * 5 + [far] * 10) == [24]


@pytest.mark.parametrize("near", [0.5, 1.0, 2.0])
def test_near(near: float) -> None:
    assert messages([near] * 40) == []


def test_an_inverse_that_does_not_know_its_error_says_nothing() -> None:
    assert messages([-1.0] * 40, comparable=False) == []
