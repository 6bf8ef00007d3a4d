"""What a policy does at the edges: invalid samples, zero gradients, bounds that do not hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    SPSB,
    AutoSLS,
    Constant,
    DecSPS,
    Envelope,
    GradientNorm,
    GuardedSLS,
    Outcome,
    Policy,
    SPSMax,
    armijo_ceiling,
)
from tests.policies.helpers import (
    every_bounded,
    every_closed_form,
    every_policy,
    every_search,
    halved_square,
    take,
)

# R1, R2: what is not finite.


@every_policy
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "slope"])
def test_nothing_moves_where_the_sample_is_not_finite(policy: Policy[Any], name: str, value: float) -> None:
    _, state = take(policy)
    record, after = take(policy, state, **{name: value})
    assert record.step_size == 0.0
    assert not record.moved
    assert record.outcome == Outcome.non_finite
    assert record.trials == 0
    assert after == state


@pytest.mark.parametrize("raw", [math.nan, np.float64("nan")])
def test_a_raw_value_that_is_nan_is_no_step(raw: float) -> None:
    policy = Envelope(bound=0.5, floor=0.1)
    record, state = take(policy, raw=raw)
    assert (record.step_size, record.outcome) == (0.0, Outcome.non_finite)
    assert state == policy.init()


@every_bounded
def test_a_bound_that_is_nan_is_no_step(policy: Policy[Any]) -> None:
    for state in (policy.init(), take(policy)[1]):
        record, after = take(policy, state, bound=math.nan)
        assert (record.step_size, record.outcome) == (0.0, Outcome.non_finite)
        assert after == state


def test_a_decay_that_is_nan_is_no_step() -> None:
    for policy in (Constant(bound=0.5, decay=lambda k: math.nan), SLSB(bound=0.5, decay=lambda k: math.nan)):
        record, _ = take(policy)
        assert (record.step_size, record.outcome) == (0.0, Outcome.non_finite)


@pytest.mark.parametrize("policy", [SPSMax(bound=math.inf), SPSMax(), DecSPS(), SPSB()], ids=repr)
@pytest.mark.parametrize("lower_bound", [0.0, -math.inf, math.nan])
def test_a_step_is_never_infinite(policy: SPSMax, lower_bound: float) -> None:
    if lower_bound == 0.0 and policy.bound is None:
        slope = 5e-324  # the bound cannot be found here
    else:
        slope = 5e-324 if lower_bound == 0.0 else 4.0
    record, state = take(policy, slope=slope, lower_bound=lower_bound)
    assert record.step_size == 0.0
    assert state == policy.init()


@pytest.mark.parametrize("slope", [5e-324, 1e-310, 1e-300])
@every_closed_form
def test_no_division_by_an_underflown_slope(policy: Policy[Any], slope: float) -> None:
    record, _ = take(policy, slope=slope)
    assert 0.0 < record.step_size <= 1.0
    record, _ = take(policy, slope=np.float64(slope))  # NumPy would warn about an overflow
    assert 0.0 < record.step_size <= 1.0


def test_squares_that_would_overflow_are_not_accumulated() -> None:
    policy = GradientNorm()
    _, state = take(policy, slope=1.5e308)
    record, after = take(policy, state, slope=1.5e308)
    assert record.outcome == Outcome.non_finite
    assert after == state


@every_search
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trial_that_is_not_finite_is_rejected(policy: Policy[Any], value: float) -> None:
    record, _ = take(policy, trial=lambda step: value if step > 0.2 else halved_square(step))
    assert 0.0 < record.step_size <= 0.2
    assert record.outcome == Outcome.accepted
    record, state = take(policy, trial=lambda step: value)
    assert record.outcome == Outcome.search_failed
    assert state == policy.init()


# R3: nothing to descend along.


@every_policy
@pytest.mark.parametrize(("slope", "outcome"), [(0.0, Outcome.zero_gradient), (-1.0, Outcome.no_descent)])
def test_no_slope_no_move_no_state(policy: Policy[Any], slope: float, outcome: Outcome) -> None:
    _, state = take(policy)
    record, after = take(policy, state, slope=slope)
    assert record.step_size == 0.0
    assert record.outcome == outcome
    assert after == state


@pytest.mark.parametrize("policy", [SLS(), SLSB(), AutoSLS(), GuardedSLS()], ids=repr)
def test_a_search_that_starts_at_a_solution_has_nothing_to_descend_along(policy: SLS | SLSB | AutoSLS) -> None:
    """The slope is one of rounding errors: it gives no scale for a first trial, whatever the lower bound is."""
    record, state = take(policy, loss=0.5, slope=1e-31)
    assert (record.step_size, record.trials, record.outcome) == (0.0, 0, Outcome.zero_gradient)
    assert state == policy.init()


@pytest.mark.parametrize("policy", [SLS(), SLSB(), AutoSLS(), GuardedSLS(), SLS(lower_bound=None)], ids=repr)
@pytest.mark.parametrize("unit", [1e16, 1e40, 1e140])
def test_a_slope_that_is_known_to_be_none_of_rounding_errors_gives_a_scale(policy: Policy[Any], unit: float) -> None:
    """The first search of f = x^2 / 2 at x = 1, and of the same f in a unit of x: steps are in its square."""

    def search(unit: float, **known: float) -> float:
        record, _ = take(
            policy,
            loss=0.5,
            slope=(1.0 / unit) ** 2,
            trial=lambda step: 0.5 * (1.0 - step / unit / unit) ** 2,
            **known,
        )
        return float(record.step_size)

    assert search(unit, most_ratio=2.0**1000) == pytest.approx(search(1.0) * unit**2)


def test_a_tie_is_accepted() -> None:
    """The first sample of S1 with c = .1 and a step of 1: 6 - .1 * 20 = 4 = f exactly."""
    record, _ = SLS(start=1.0).step(SLS(start=1.0).init(), loss=6.0, slope=20.0, trial=lambda step: 4.0)
    assert (record.step_size, record.trials) == (1.0, 1)


# R4: a lower bound that is none.


@pytest.mark.parametrize("policy", [SPSMax(bound=0.5), SPSB(bound=0.5), DecSPS(bound=0.5)], ids=repr)
@pytest.mark.parametrize("loss", [-3.0, -1e-300, 0.0])
def test_below_the_lower_bound_polyak_takes_no_step(policy: SPSMax, loss: float) -> None:
    record, state = take(policy, loss=loss)
    assert (record.step_size, record.proposed) == (0.0, 0.0)
    assert record.outcome == (Outcome.below_lower_bound if loss < 0.0 else Outcome.at_lower_bound)
    assert state == policy.init()


def test_below_the_lower_bound_a_floor_is_taken() -> None:
    policy = Envelope(bound=0.5, floor=0.1)
    record, state = take(policy, loss=-3.0)
    assert (record.step_size, record.outcome) == (0.1, Outcome.below_lower_bound)
    assert state.count == 1


def test_below_the_lower_bound_a_search_goes_on_without_a_ceiling() -> None:
    record, _ = take(SLS(start=0.5), loss=2.0, lower_bound=5.0)
    assert (record.step_size, record.bound) == (0.5, math.inf)
    record, state = take(SLS(), loss=2.0, lower_bound=5.0)
    assert (record.outcome, state.found) == (Outcome.accepted, record.step_size)


@pytest.mark.parametrize("policy", [SPSMax(bound=9.0), SPSB(bound=9.0), DecSPS(bound=9.0)], ids=repr)
def test_the_lower_bound_of_a_step_overrides_the_option(policy: SPSMax) -> None:
    assert take(policy)[0].step_size == 0.5
    assert take(policy, lower_bound=1.0)[0].step_size == 0.25
    refusing = dataclasses.replace(policy, lower_bound=None)
    assert take(refusing, lower_bound=1.0)[0].step_size == 0.25
    with pytest.raises(OptionError, match=r"lower_bound=None.*give one as an option or at the step, or use a search"):
        take(refusing)


@pytest.mark.parametrize(("raw", "outcome"), [(0.3, "at_floor"), (1.0, "at_bound"), (3.0, "at_bound")])
def test_a_floor_above_the_bound_is_the_bound(raw: float, outcome: str) -> None:
    record, _ = take(Envelope(bound=0.5, floor=2.0), raw=raw)
    assert (record.step_size, record.outcome) == (0.5, Outcome[outcome])


def test_a_raw_step_needs_no_lower_bound() -> None:
    record, _ = take(Envelope(bound=0.5, lower_bound=None), raw=0.3, loss=-7.0)
    assert (record.step_size, record.outcome) == (0.3, Outcome.accepted)


# R5: the loss's own resolution.


def test_a_decrease_below_the_resolution_of_the_loss_is_accepted() -> None:
    """At loss 1 in float32, a decrease of 1e-8 is invisible: the value at the trial is 1 too."""
    policy = SLS(start=1.0, c=0.5)
    loss, slope = np.float32(1.0), np.float32(1e-8)
    record, _ = policy.step(policy.init(), loss=loss, slope=slope, trial=lambda step: loss)
    assert (record.step_size, record.trials) == (1.0, 1)
    record, _ = policy.step(policy.init(), loss=1.0, slope=1e-8, trial=lambda step: 1.0, rounding=2.0**-23)
    assert (record.step_size, record.trials) == (1.0, 1)
    record, _ = policy.step(policy.init(), loss=1.0, slope=1e-8, trial=lambda step: 1.0)
    assert record.trials > 10
    record, _ = policy.step(policy.init(), loss=loss, slope=slope, trial=lambda step: np.float32(1.0001))
    assert record.outcome == Outcome.search_failed


@pytest.mark.parametrize("rejected", [0, 2])
def test_a_decrease_that_rounding_hides_does_not_shorten_the_next_search(rejected: int) -> None:
    policy = SLS(start=1.0, reset="keep")
    _, state = take(policy, trial=lambda step: 0.0)
    values = iter([1.0 + 1e-12] * rejected + [1.0])
    record, state = take(policy, state, loss=1.0, slope=1e-18, trial=lambda step: next(values))
    assert record.step_size == 0.5**rejected
    assert (state.previous, state.count) == (1.0, 2)
    values = iter([1.0 + 1e-12] * rejected + [0.5])
    record, state = take(policy, state, loss=1.0, slope=1e-3, trial=lambda step: next(values))
    assert state.previous == record.step_size == 0.5**rejected


# R7: the clock.


@pytest.mark.parametrize(("decay", "factors"), [("constant", (1, 1, 1)), ("inverse", (1, 1 / 2, 1 / 3))])
def test_the_first_bound_is_the_option_and_only_moves_count(decay: str, factors: tuple[float, ...]) -> None:
    for policy in (SPSB(bound=0.4, decay=decay), Constant(bound=0.4, decay=decay), SLSB(bound=0.4, decay=decay)):
        state = policy.init()
        for k, factor in enumerate(factors):
            for idle in ({"loss": math.nan}, {"slope": 0.0}, {"slope": -1.0}):
                record, state = take(policy, state, **idle)
                assert not record.moved
            record, state = take(policy, state)
            assert record.bound == pytest.approx(0.4 * factor, rel=1e-15)
            assert state.count == k + 1


def test_a_callable_schedule_gets_the_number_of_moves() -> None:
    seen: list[Any] = []

    def decay(k: Any) -> float:
        seen.append(k)
        return float(0.5**k)

    policy, state = SPSB(bound=0.4, decay=decay), SPSB(bound=0.4).init()
    bounds = []
    for _ in range(3):
        record, state = take(policy, state)
        bounds.append(record.bound)
    assert seen == [0, 1, 2]
    assert bounds == [0.4, 0.2, 0.1]


@every_bounded
def test_the_bound_of_a_step_overrides_the_option(policy: Policy[Any]) -> None:
    record, state = take(policy, bound=0.2)
    assert record.step_size == (1.6 if isinstance(policy, GuardedSLS) else 0.2)  # which goes up from a first trial
    assert state.found == 0.0
    if not isinstance(policy, SLS):  # there it is the first trial of the first search
        assert take(policy, state, bound=0.05)[0].step_size <= 0.05


@every_bounded
def test_a_bound_of_zero_stops_quietly(policy: Policy[Any]) -> None:
    """The end of a schedule that goes to 0."""
    _, state = take(policy)
    record, after = take(policy, state, bound=0.0)
    assert (record.step_size, record.trials) == (0.0, 0)
    assert record.outcome in (Outcome.at_bound, Outcome.accepted)
    assert after == state


# A bound that was not given.


@pytest.mark.parametrize(
    "policy", [SPSMax(), SPSB(decay="inverse"), DecSPS(), Envelope(), SLS(), SLSB(decay="inverse")], ids=repr
)
def test_the_bound_is_found_at_the_first_step_that_moves(policy: SPSMax) -> None:
    """(f - l) / (c s) with c = .1: 2 / .4 = 5."""
    assert policy.first_bound(loss=2.0, slope=4.0) == pytest.approx(5.0)
    assert policy.first_bound(loss=2.0, slope=4.0, lower_bound=1.0) == pytest.approx(2.5)
    for loss, slope in ((math.nan, 4.0), (2.0, math.inf), (math.inf, 4.0), (2.0, 0.0), (2.0, -1.0), (0.0, 4.0)):
        assert policy.first_bound(loss=loss, slope=slope) == 0.0
        record, state = take(policy, loss=loss, slope=slope)
        assert not record.moved
        assert state == policy.init()
    tried = not isinstance(policy, (SLS, SLSB))
    for trial, found in (({"trial": None}, 5.0), ({}, 1.25)) if tried else (({}, 5.0),):
        _, state = take(policy, **trial)
        assert state.found == pytest.approx(found)
        _, state = take(policy, state, loss=7.0)
        assert state.found == pytest.approx(found)


def test_a_rule_without_lower_bound_finds_none() -> None:
    assert SPSMax(lower_bound=None).first_bound(loss=2.0, slope=4.0) == 0.0
    assert SLS(start=1.0, lower_bound=None).first_bound(loss=2.0, slope=4.0) == 0.0


def test_armijo_ceiling() -> None:
    assert armijo_ceiling(2.0, 4.0, 0.0) == pytest.approx(5.0)
    assert armijo_ceiling(2.0, 4.0, 1.0, c=0.5) == pytest.approx(0.5)
