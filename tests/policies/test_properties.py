"""What holds for every sample, schedule and option, checked on random ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    SPSB,
    AutoSLS,
    Constant,
    DecSPS,
    Envelope,
    GradientNorm,
    Outcome,
    Policy,
    SPSMax,
    decay_factor,
    reset,
)
from tests.single_level import Quadratic, dot, moved, run

DECAYS = ("constant", "inverse_sqrt", "inverse")
OPTIONS = ("initial", "keep", "grow")
UNIT = 1e-12  # relative slack of a comparison

positive = st.floats(1e-6, 1e6)
steps = st.floats(1e-3, 1e3)
curvatures = st.floats(0.1, 10.0)
centers = st.floats(-3.0, 3.0)
quadratics = st.builds(Quadratic, st.tuples(curvatures, curvatures), st.tuples(centers, centers), st.floats(0.0, 2.0))
problems = st.lists(quadratics, min_size=1, max_size=3)
points = st.tuples(st.floats(-5.0, 5.0), st.floats(-5.0, 5.0))


def smoothness(samples: Sequence[Quadratic]) -> float:
    return max(max(sample.curvature) for sample in samples)


def orders(samples: Sequence[Quadratic], length: int) -> list[int]:
    return [k % len(samples) for k in range(length)]


# 1. The envelope.


@given(
    raw=positive | st.floats(allow_nan=False),
    floor=st.floats(0.0, 1e6),
    bound=positive,
    decay=st.sampled_from(DECAYS),
    floor_decay=st.sampled_from(DECAYS),
    k=st.integers(0, 10**6),
)
def test_envelope_keeps_any_raw_step(
    raw: float, floor: float, bound: float, decay: str, floor_decay: str, k: int
) -> None:
    policy = Envelope(bound=bound, decay=decay, floor=floor, floor_decay=floor_decay)
    record, _ = policy.step(policy.init()._replace(count=k), loss=1.0, slope=1.0, raw=raw)
    high = bound * decay_factor(decay, k)
    low = min(floor * decay_factor(floor_decay, k), high)
    assert record.bound == high
    assert low <= record.step_size <= high
    expected = Outcome.at_bound if raw > high else Outcome.at_floor if raw < low else Outcome.accepted
    assert record.outcome == expected
    assert record.step_size == (high if raw > high else low if raw < low else raw)


@given(decay=st.sampled_from(DECAYS), k=st.integers(0, 10**9))
def test_schedules_do_not_increase(decay: str, k: int) -> None:
    assert decay_factor(decay, 0) == 1.0
    assert 0.0 < decay_factor(decay, k + 1) <= decay_factor(decay, k)


# 2. Polyak's rules.


@given(samples=problems, x=points, bound=steps, c=st.floats(0.3, 3.0), decay=st.sampled_from(DECAYS), gap=centers)
def test_polyak_steps_lie_between_their_bounds(
    samples: list[Quadratic], x: Sequence[float], bound: float, c: float, decay: str, gap: float
) -> None:
    """Of min{1 / (2 c L), bound_k} and bound_k, with any lower bound of the losses."""
    L = smoothness(samples)
    for policy in (SPSB(bound=bound, c=c, decay=decay, lower_bound=-abs(gap)), SPSMax(bound=bound, c=c)):
        k = 0
        for visit in run(policy, samples=samples, x=x, order=orders(samples, 6))[0]:
            if visit.record.outcome in (Outcome.accepted, Outcome.at_bound):
                high = bound * decay_factor(policy.decay, k)
                assert visit.record.bound == pytest.approx(high, rel=UNIT)
                assert visit.record.step_size <= high * (1 + UNIT)
                if visit.record.slope > 1e-10:  # below, f - f* is rounding
                    assert visit.record.step_size >= min(1 / (2 * c * L), high) * (1 - 1e-6)
            k = visit.state.count


@given(samples=problems, x=points, bound=steps, c=st.floats(0.3, 3.0))
def test_decsps_steps_lie_between_their_bounds_and_do_not_increase(
    samples: list[Quadratic], x: Sequence[float], bound: float, c: float
) -> None:
    L, k, last = smoothness(samples), 0, math.inf
    for visit in run(DecSPS(bound=bound, c=c), samples=samples, x=x, order=orders(samples, 8))[0]:
        if visit.record.moved and visit.state.count > k:
            c_k = c * math.sqrt(k + 1)
            step = visit.record.step_size
            assert step <= min(c * bound / c_k, last) * (1 + UNIT)
            if visit.record.slope > 1e-10:
                assert step >= min(1 / (2 * c_k * L), c * bound / c_k, last) * (1 - 1e-6)
            k, last = visit.state.count, step


@given(loss=positive, slope=positive, low=st.floats(-10.0, 0.0), lower=st.floats(0.0, 10.0), scale=st.floats(0.01, 100))
def test_polyak_ratio_scales_and_grows_with_the_gap(
    loss: float, slope: float, low: float, lower: float, scale: float
) -> None:
    """Scaling f and l by s divides the step by s (the slope grows by s^2); a smaller l gives no smaller step."""
    policies: tuple[Policy[Any], ...] = (SPSMax(bound=math.inf), SPSB(bound=1e30), DecSPS(bound=1e30))
    for policy in policies:

        def step(loss: float, slope: float, lower_bound: float) -> float:
            return float(policy.step(policy.init(), loss=loss, slope=slope, lower_bound=lower_bound)[0].step_size)

        assert step(scale * loss, scale**2 * slope, scale * low) == pytest.approx(step(loss, slope, low) / scale)
        assert step(loss, slope, low - lower) >= step(loss, slope, low)


# 3. Searches.


@given(
    samples=problems,
    x=points,
    start=steps,
    c=st.floats(0.05, 0.9),
    shrink=st.floats(0.2, 0.9),
    option=st.sampled_from(OPTIONS),
    bounded=st.booleans(),
)
def test_search_accepts_the_first_step_with_sufficient_decrease(
    samples: list[Quadratic],
    x: Sequence[float],
    start: float,
    c: float,
    shrink: float,
    option: str,
    bounded: bool,
) -> None:
    options: dict[str, Any] = {"c": c, "shrink": shrink, "reset": option}
    policy: SLS | SLSB = SLSB(bound=start, **options) if bounded else SLS(start=start, **options)
    order = orders(samples, 4)
    visits, end = run(policy, samples=samples, x=x, order=order)
    again, end_again = run(policy, samples=samples, x=x, order=order)
    assert end == end_again
    for i, visit, repeat in zip(order, visits, again, strict=True):
        assert (visit.record[:6], visit.state) == (repeat.record[:6], repeat.state) or not visit.record.trials
        if visit.record.slope < 1e-10:
            continue
        sample, record = samples[i], visit.record
        gradient = sample.gradient(visit.x)

        def enough(step: float) -> bool:
            loss, value = sample.loss(visit.x), sample.loss(moved(visit.x, step, gradient))
            return bool(value <= loss * (1 + UNIT) - c * step * record.slope)

        first, last = visit.tried[0], visit.tried[-1]
        assert record.step_size == last
        assert record.trials == len(visit.tried)
        assert visit.tried == pytest.approx([first * shrink**r for r in range(record.trials)], rel=UNIT)
        assert enough(last)
        assert not any(enough(step * (1 + 1e-6)) for step in visit.tried[:-1])
        ceiling = sample.loss(visit.x) / (c * record.slope)
        assert first <= ceiling * (1 + UNIT)
        assert last >= min(first, shrink * 2 * (1 - c) / smoothness([sample])) * (1 - 1e-6)
        assert first <= record.bound


# 4. Where a search starts.


@given(previous=positive, initial=positive, grow=st.floats(1.0, 10.0), cap=st.floats(1e-6, math.inf))
def test_reset(previous: float, initial: float, grow: float, cap: float) -> None:
    def start(option: str, previous: float = previous, grow: float = grow) -> float:
        return reset(previous, initial, option=option, grow=grow, cap=cap)

    assert start("initial") == min(initial, cap)
    assert start("keep") == min(previous, cap)
    assert start("grow") == min(grow * previous, cap)
    assert start("grow", grow=1.0) == start("keep")
    assert {start(option, previous=0.0) for option in OPTIONS} == {min(initial, cap)}


@pytest.mark.parametrize("option", OPTIONS)
def test_starts_stay_finite(option: str) -> None:
    """A function that falls for ever, with no lower bound to cap the growth."""
    policy = SLS(start=1.0, grow=2.0, reset=option, lower_bound=None)
    state = policy.init()
    for _ in range(5000):
        record, state = policy.step(state, loss=0.0, slope=1.0, trial=lambda step: -0.5 * step)
        assert math.isfinite(record.step_size)
    assert state.count == 5000
    assert state.previous > 0.0


@given(option=st.sampled_from(OPTIONS), kinds=st.lists(st.sampled_from(["fail", "zero", "up", "nan"]), max_size=6))
def test_steps_that_do_not_move_feed_no_reset(option: str, kinds: list[str]) -> None:
    samples: dict[str, dict[str, Any]] = {
        "fail": {"trial": lambda step: 9.0},
        "zero": {"slope": 0.0},
        "up": {"slope": -1.0},
        "nan": {"loss": math.nan},
    }
    sample: dict[str, Any] = {"loss": 2.0, "slope": 4.0, "trial": lambda step: 0.5 * (2.0 - 2.0 * step) ** 2}
    policy = SLS(start=0.125, grow=2.0, reset=option)
    _, state = policy.step(policy.init(), **sample)
    for kind in kinds:
        record, after = policy.step(state, **{**sample, **samples[kind]})
        assert not record.moved
        assert after == state
    record, _ = policy.step(state, **sample)
    assert record.step_size == {"initial": 0.125, "keep": 0.125, "grow": 0.25}[option]


# 9. Accumulated gradient norms.


@given(
    slopes=st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6), st.floats(0.0, 1e6)), min_size=1, max_size=20),
    initial=st.floats(1e-3, 1e3),
)
def test_accumulators_never_fall_and_steps_never_grow(slopes: list[tuple[float, float, float]], initial: float) -> None:
    rules = [GradientNorm(initial=initial, coupling=coupling) for coupling in ("none", "max", "product")]
    states = [rule.init() for rule in rules]
    last = [math.inf] * 3
    for sample in slopes:
        before = list(states)
        for j, (rule, slope) in enumerate(zip(rules, sample, strict=True)):
            record, states[j] = rule.step(states[j], loss=1.0, slope=slope, shared=states[:j])
            assert states[j].squares == before[j].squares + slope
            assert record.proposed <= last[j] * (1 + UNIT)
            assert record.bound == math.inf
            assert record.step_size == (record.proposed if slope > 0.0 else 0.0)
            last[j] = record.proposed
        y, v, x = (state.squares for state in states)
        assert last == pytest.approx([y**-0.5, max(y, v) ** -0.5, (x * max(y, v)) ** -0.5])


# 12. Samples that are not finite, at any call.

ALL: tuple[Policy[Any], ...] = (
    Constant(bound=0.1),
    SPSMax(bound=0.5),
    SPSMax(),
    DecSPS(bound=0.5),
    DecSPS(),
    SPSB(bound=0.5),
    SPSB(),
    Envelope(bound=0.5, floor=0.01),
    SLS(start=0.5),
    SLS(),
    SLSB(bound=0.5),
    SLSB(),
    AutoSLS(bound=0.5),
    AutoSLS(),
    GradientNorm(),
)


@pytest.mark.parametrize("policy", ALL, ids=repr)
@given(
    x=points,
    samples=problems,
    where=st.integers(0, 5),
    name=st.sampled_from(["loss", "slope", "trial"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_sample_that_is_not_finite_is_as_if_it_had_not_been(
    policy: Policy[Any], x: Sequence[float], samples: list[Quadratic], where: int, name: str, value: float
) -> None:
    def trajectory(poisoned: int | None) -> list[tuple[Any, Any]]:
        point, state, results = list(x), policy.init(), []
        for k, i in enumerate(orders(samples, 6)):
            at, sample = point, samples[i]
            gradient = sample.gradient(at)
            slope = dot(gradient, gradient)
            clean: dict[str, Any] = {
                "loss": sample.loss(at),
                "slope": slope,
                "trial": lambda step: sample.loss(moved(at, step, gradient)),
            }
            if k == poisoned:
                bad = {name: (lambda step: value) if name == "trial" else value}
                record, after = policy.step(state, **{**clean, **bad})
                if name == "trial":
                    assert record.outcome != Outcome.non_finite
                    if record.trials:
                        assert (record.outcome, record.step_size) == (Outcome.search_failed, 0.0)
                        assert after == state
                else:
                    assert (record.outcome, record.step_size) == (Outcome.non_finite, 0.0)
                    assert after == state
            record, state = policy.step(state, **clean)
            assert all(math.isfinite(part) for part in state)
            point = moved(at, record.step_size, gradient)
            assert all(math.isfinite(part) for part in point)
            results.append((record.step_size, state))
        return results

    assert trajectory(where) == trajectory(None)


@given(samples=problems, x=points, bound=steps, factor=st.floats(0.01, 1.0))
def test_a_smaller_bound_gives_no_longer_first_step(
    samples: list[Quadratic], x: Sequence[float], bound: float, factor: float
) -> None:
    assume(dot(samples[0].gradient(x), samples[0].gradient(x)) > 1e-6)
    for policy in (SPSMax(bound=bound), SPSB(bound=bound), DecSPS(bound=bound), Constant(bound=bound)):
        wide = run(policy, samples=samples, x=x, order=[0])[0][0].record.step_size
        small = dataclasses.replace(policy, bound=bound * factor)
        assert run(small, samples=samples, x=x, order=[0])[0][0].record.step_size <= wide
