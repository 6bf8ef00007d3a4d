"""What a record says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.policies import (
    SLS,
    SPSB,
    Outcome,
    Policy,
)
from tests.policies.helpers import (
    every_policy,
    take,
)


def test_every_outcome_has_its_own_sentence() -> None:
    sentences = [outcome.sentence for outcome in Outcome]
    assert len(set(sentences)) == len(Outcome) == 12
    assert [outcome.name for outcome in Outcome] == [
        "accepted",
        "at_bound",
        "at_floor",
        "search_failed",
        "no_descent",
        "zero_gradient",
        "non_finite",
        "below_lower_bound",
        "at_lower_bound",
        "kept",
        "undone",
        "returned",
    ]
    for outcome in (Outcome.search_failed, Outcome.no_descent, Outcome.zero_gradient, Outcome.non_finite):
        assert "nothing moved" in outcome.sentence


@every_policy
@pytest.mark.parametrize("sample", [{}, {"loss": math.nan}, {"slope": 0.0}, {"slope": -1.0}, {"loss": -1.0}], ids=repr)
def test_describe_says_the_outcome(policy: Policy[Any], sample: dict[str, float]) -> None:
    record, _ = take(policy, **sample)
    said = record.describe()
    assert said.endswith(Outcome(record.outcome).sentence)
    assert said.startswith(f"step {record.step_size:.4g} (proposed ")
    assert ("trial" in said.split(":")[0]) == (record.trials > 0)


def test_describe_of_arrays() -> None:
    record, _ = take(SPSB(bound=0.4), loss=np.asarray(2.0), slope=np.asarray(4.0))
    assert record.describe() == f"step 0.4 (proposed 0.5, bound 0.4): {Outcome.at_bound.sentence}"
    record, _ = take(SLS(start=0.5))
    assert record.describe() == f"step 0.5 (proposed 0.5, bound 5, 1 trial): {Outcome.accepted.sentence}"


@every_policy
def test_records_have_the_documented_fields(policy: Policy[Any]) -> None:
    record, state = take(policy)
    assert record._fields[:6] == ("step_size", "proposed", "bound", "outcome", "trials", "value")
    assert record.slope == 4.0
    assert math.isnan(record.slope_ratio)
    assert math.isnan(record.value) == (record.trials == 0)
    assert all(type(value) in (int, float) for value in state)
    assert state.count == 1
