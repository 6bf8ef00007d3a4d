"""What a policy does at the edges: invalid samples, zero gradients, bounds that do not hold, searches that fail."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.errors import AdaptiveBilevelError, OptionError
from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    SPSB,
    Constant,
    DecSPS,
    Envelope,
    GradientNorm,
    Outcome,
    Policy,
    Record,
    SPSMax,
    armijo_ceiling,
    reset,
)

CLOSED: dict[str, Policy[Any]] = {
    "constant": Constant(bound=0.5, decay="inverse"),
    "spsmax": SPSMax(bound=0.5),
    "decsps": DecSPS(bound=0.5),
    "spsb": SPSB(bound=0.5),
    "envelope": Envelope(bound=0.5, floor=0.1),
    "gradient_norm": GradientNorm(),
}
SEARCHES: dict[str, Policy[Any]] = {"sls": SLS(start=0.5), "slsb": SLSB(bound=0.5), "sls_found": SLS()}
POLICIES = {**CLOSED, **SEARCHES}

BOUNDED = {name: policy for name, policy in POLICIES.items() if name != "gradient_norm"}

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_bounded = pytest.mark.parametrize("policy", BOUNDED.values(), ids=BOUNDED)
every_closed_form = pytest.mark.parametrize("policy", CLOSED.values(), ids=CLOSED)
every_search = pytest.mark.parametrize("policy", SEARCHES.values(), ids=SEARCHES)


def halved_square(step: float) -> float:
    """f(x - step g) of f(x) = x^2 / 2 at x = 2: loss 2, slope 4."""
    return 0.5 * (2.0 - 2.0 * step) ** 2


def take(policy: Policy[Any], state: Any = None, **sample: Any) -> tuple[Record, Any]:
    """A step on a sample of x^2 / 2 at x = 2, in the parts that are not given."""
    sample = {"loss": 2.0, "slope": 4.0, "trial": halved_square, **sample}
    return policy.step(policy.init() if state is None else state, **sample)


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


@pytest.mark.parametrize("policy", [SLS(), SLSB()], ids=repr)
def test_a_search_that_starts_at_a_solution_has_nothing_to_descend_along(policy: SLS | SLSB) -> None:
    """The slope is one of rounding errors: it gives no scale for a first trial, whatever the lower bound is."""
    record, state = take(policy, loss=0.5, slope=1e-31)
    assert (record.step_size, record.trials, record.outcome) == (0.0, 0, Outcome.zero_gradient)
    assert state == policy.init()


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
    assert record.outcome == Outcome.below_lower_bound
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
    assert record.outcome == Outcome.below_lower_bound
    assert state == SLS().init()


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
    assert record.step_size == 0.2
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


# Searches.


@every_search
def test_a_search_without_a_trial_function_is_refused(policy: Policy[Any]) -> None:
    with pytest.raises(OptionError, match=r"step\(trial=None\)"):
        policy.step(policy.init(), loss=2.0, slope=4.0)


@pytest.mark.parametrize("option", ["initial", "keep", "grow"])
@pytest.mark.parametrize("family", [SLS, SLSB])
def test_no_trial_is_above_the_ceiling(family: Any, option: str) -> None:
    """f(x) = |x|, which allows steps of nearly (f - l) / (c s), so that the starts run into the ceiling."""
    name = "start" if family is SLS else "bound"
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
    unknown = SLS(start=1.0, lower_bound=None)
    assert unknown.first_trial(unknown.init(), loss=2.0, slope=4.0) == math.inf


def test_reset_is_the_rule_of_algorithm_3() -> None:
    assert reset(0.0, 8.0, option="grow", grow=2.0, cap=math.inf) == 8.0
    assert reset(0.5, 8.0, option="grow", grow=2.0, cap=0.75) == 0.75


# What is said.


def test_every_outcome_has_its_own_sentence() -> None:
    sentences = [outcome.sentence for outcome in Outcome]
    assert len(set(sentences)) == len(Outcome) == 8
    assert [outcome.name for outcome in Outcome] == [
        "accepted",
        "at_bound",
        "at_floor",
        "search_failed",
        "no_descent",
        "zero_gradient",
        "non_finite",
        "below_lower_bound",
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


# Options.

WRONG: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    *[
        (family, {"bound": value})
        for family in (Constant, SPSMax, SPSB, DecSPS, Envelope, SLSB)
        for value in (0.0, -1.0, math.nan, "1", True)
    ],
    (Constant, {"bound": None}),
    (Constant, {"bound": math.inf}),
    (SLSB, {"bound": math.inf}),
    *[(SLS, {"start": value}) for value in (0.0, -1.0, math.nan, math.inf, "1")],
    *[(SLS, {"max_step": value}) for value in (0.0, -1.0, math.nan)],
    *[(SPSB, {"c": value}) for value in (0.0, -1.0, math.nan, math.inf, "sqrt", None)],
    *[(DecSPS, {"c": value}) for value in (0.0, -1.0, math.inf)],
    *[(family, {"c": value}) for family in (SLS, SLSB) for value in (0.0, 1.0, -1.0, math.nan, 2)],
    *[(SLS, {"shrink": value}) for value in (0.0, 1.0, 2.0, -0.5, None)],
    *[(SLS, {"grow": value}) for value in (0.5, 0, math.inf, math.nan, "2", True)],
    *[(SLS, {"reset": value}) for value in ("always", 1, None)],
    *[(SLS, {"slack": value}) for value in (-1e-9, math.inf, math.nan)],
    *[(SLS, {"max_trials": value}) for value in (0, -1, 2.5, True)],
    *[(family, {"lower_bound": value}) for family in (SPSB, SLS) for value in (math.nan, math.inf, -math.inf, "0")],
    *[(family, {"decay": value}) for family in (SPSB, SLSB, Constant) for value in ("linear", None, 0.5)],
    (DecSPS, {"decay": "inverse"}),
    *[(Envelope, {"floor": value}) for value in (-0.1, math.inf, math.nan)],
    (Envelope, {"floor_decay": "linear"}),
    *[(GradientNorm, {"initial": value}) for value in (0.0, -1.0, math.inf, math.nan)],
    (GradientNorm, {"coupling": "sum"}),
]


@pytest.mark.parametrize(("family", "option"), WRONG, ids=lambda part: getattr(part, "__name__", repr(part)))
def test_wrong_options(family: Any, option: dict[str, Any]) -> None:
    given = {"bound": 1.0, **option} if family is Constant else option
    with pytest.raises(ValueError) as caught:
        family(**given)
    assert isinstance(caught.value, AdaptiveBilevelError)
    ((name, value),) = option.items()
    said = str(caught.value)
    assert said.startswith(f"{family.__name__}({name}={value!r})")
    assert said.split(": ", 1)[1]  # the remedy


@pytest.mark.parametrize("family", [SLS, SLSB])
def test_a_search_needs_a_start_or_a_lower_bound(family: Any) -> None:
    with pytest.raises(OptionError, match=r"None, lower_bound=None.*give one of the two"):
        family(lower_bound=None)


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.float64(0.5), np.int64(3)], ids=repr)
def test_numpy_numbers_are_numbers(value: Any) -> None:
    assert SPSB(bound=value).bound == value
    count: Any = np.int64(3)
    assert SLS(max_trials=count).max_trials == 3
    assert SLS(start=value).start == value


@every_policy
def test_a_policy_is_a_frozen_value(policy: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.bound = 2.0
    assert dataclasses.replace(policy) == policy
    assert hash(dataclasses.replace(policy)) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert pickle.loads(pickle.dumps(policy.init())) == policy.init()
    with pytest.raises(TypeError):
        type(policy)(0.5)  # options are keywords
    with pytest.raises(TypeError, match="momentum"):
        type(policy)(momentum=0.9)
