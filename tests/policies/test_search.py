"""Searches: where they start, what they try, and when they give up."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    AutoSLS,
    GuardedSLS,
    Outcome,
    Policy,
    reset,
)
from tests.policies.helpers import (
    every_search,
    halved_square,
    take,
)


@every_search
def test_a_search_without_a_trial_function_is_refused(policy: Policy[Any]) -> None:
    with pytest.raises(OptionError, match=r"step\(trial=None\)"):
        policy.step(policy.init(), loss=2.0, slope=4.0)


@pytest.mark.parametrize("option", ["initial", "keep", "grow"])
@pytest.mark.parametrize("family", [SLS, SLSB, AutoSLS, GuardedSLS])
def test_no_trial_is_above_the_ceiling(family: Any, option: str) -> None:
    """f(x) = |x|, which allows steps of nearly (f - l) / (c s), so that the starts run into the ceiling."""
    name = "start" if issubclass(family, SLS) else "bound"
    policy = family(**{name: 100.0}, c=0.3, reset=option, grow=3.0)
    state, x = policy.init(), 5.0
    for _ in range(30):
        tried: list[float] = []

        def trial(step: float) -> float:
            tried.append(step)
            return abs(x - step)

        ceiling = abs(x) / 0.3
        record, state = policy.step(state, loss=abs(x), slope=1.0, trial=trial)
        assert record.bound <= ceiling
        assert max(tried) <= ceiling
        assert len(tried) == record.trials
        x = x - record.step_size if record.moved else 5.0


def test_slack_lifts_the_ceiling() -> None:
    """f = 0 at a step of .45 is within the slack .2 of the decrease asked for, above the bare ceiling .4."""
    policy = SLS(start=0.45, c=0.5, slack=0.2)
    record, _ = policy.step(policy.init(), loss=0.8, slope=4.0, trial=lambda step: 0.0)
    assert record.step_size == 0.45


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_trials(limit: int) -> None:
    policy = SLS(start=0.5, max_trials=limit)
    record, state = take(policy, trial=lambda step: 3.0)
    assert (record.trials, record.outcome) == (limit, Outcome.search_failed)
    assert record.proposed == 0.5 * 0.5 ** (limit - 1)
    assert record.value == 3.0
    assert state == policy.init()


@pytest.mark.parametrize(("shrink", "trials"), [(0.5, 40), (0.9, 263)])
def test_a_search_gives_up_at_1e_12_of_its_start(shrink: float, trials: int) -> None:
    record, _ = take(SLS(start=0.5, shrink=shrink), trial=lambda step: 3.0)
    assert record.trials == trials
    assert record.proposed <= 0.5e-12 / shrink


def test_max_step() -> None:
    policy = SLS(start=0.5, max_step=0.6, grow=2.0)
    record, state = take(policy)
    record, state = take(policy, state)
    assert (record.step_size, record.bound, record.outcome) == (0.6, 0.6, Outcome.at_bound)
    assert take(policy, state, cap=0.1)[0].step_size == 0.1


def test_certify_may_reject_what_decreases() -> None:
    asked: list[float] = []

    def certify(step: float) -> bool:
        asked.append(step)
        return step < 0.3

    record, _ = take(SLS(start=4.0), certify=certify)
    assert record.step_size == 0.25
    assert asked == [1.0, 0.5, 0.25]  # 4 and 2 had failed the trial


def test_a_failing_trial_function_leaves_the_state() -> None:
    policy = SLS(start=0.5)
    _, state = take(policy)
    kept = copy.deepcopy(state)

    def trial(step: float) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(policy, state, trial=trial)
    assert state == kept


@pytest.mark.parametrize("option", ["initial", "keep", "grow"])
def test_first_trial_is_where_the_search_starts(option: str) -> None:
    policy = SLS(start=1.5, reset=option, grow=2.0)
    state = policy.init()
    for _ in range(4):
        tried: list[float] = []

        def trial(step: float) -> float:
            tried.append(step)
            return halved_square(step)

        expected = policy.first_trial(state, loss=2.0, slope=4.0, bound=policy.start)
        _, state = policy.step(state, loss=2.0, slope=4.0, trial=trial)
        assert tried[0] == expected
    unknown = SLS(lower_bound=None)
    assert unknown.first_trial(unknown.init(), loss=-2.0, slope=4.0) == 0.5


def test_reset_is_the_rule_of_algorithm_3() -> None:
    assert reset(0.0, 8.0, option="grow", grow=2.0, cap=math.inf) == 8.0
    assert reset(0.5, 8.0, option="grow", grow=2.0, cap=0.75) == 0.75
