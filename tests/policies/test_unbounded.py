"""Searches where the loss has no lower bound, or is not above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from adaptive_bilevel.policies import SLS, SLSB, AutoSLS, Outcome, Record

FAMILIES = [SLS, SLSB, AutoSLS]
every_family = pytest.mark.parametrize("family", FAMILIES)


def descend(
    policy: Any,
    f: Callable[[float], float],
    slope_at: Callable[[float], float],
    x: float,
    *,
    steps: int = 1,
    **options: Any,
) -> tuple[float, list[Record], Any]:
    """Step a function of one variable along its derivative."""
    state, records = policy.init(), []
    for _ in range(steps):
        g = slope_at(x)
        record, state = policy.step(state, loss=f(x), slope=g * g, trial=lambda a, x=x, g=g: f(x - a * g), **options)
        x -= record.step_size * g
        records.append(record)
    return x, records, state


@every_family
@pytest.mark.parametrize("low", [None, 0.0])
@pytest.mark.parametrize("shift", [-3.0, -50.0, -1e6])
def test_a_shifted_parabola_is_solved(family: Any, low: float | None, shift: float) -> None:
    x, records, _ = descend(family(lower_bound=low), lambda x: 0.5 * x * x + shift, lambda x: x, 1.0, steps=30)
    assert 0.5 * x * x < 1e-4
    assert records[0].trials <= 30
    assert sum(r.trials for r in records[1:]) <= 60


@every_family
@pytest.mark.parametrize("exponent", range(-40, 41, 10))
@pytest.mark.parametrize("shift", [-7.0, -0.625, 0.0])
def test_units_do_not_matter(family: Any, exponent: int, shift: float) -> None:
    """By powers of 2, to the bit: f -> s f, and x -> x / t."""

    def run(s: float, t: float) -> list[tuple[float, int]]:
        _, records, _ = descend(
            family(lower_bound=None),
            lambda x: s * (0.5 * (t * x) ** 2 + shift),
            lambda x: s * t * t * x,
            1.0 / t,
            steps=6,
        )
        return [(r.step_size * s * t * t, r.trials) for r in records]

    unit = 2.0**exponent
    assert run(unit, 1.0) == run(1.0, 1.0)
    assert run(1.0, unit) == run(1.0, 1.0)


@every_family
def test_a_loss_of_exactly_zero_gives_a_length_by_trials(family: Any) -> None:
    x, records, _ = descend(family(lower_bound=None), lambda x: 0.5e4 * x * x - 0.5e4, lambda x: 1e4 * x, 1.0, steps=12)
    assert 0.5 * x * x < 1e-3
    assert records[0].trials < 40


@every_family
def test_a_bound_that_is_none_does_not_hold_a_search(family: Any) -> None:
    """f = 0 = lower_bound at the start, and below it afterwards."""
    x, records, _ = descend(family(), lambda x: 1.5 * x * x - 6.0, lambda x: 3.0 * x, 2.0, steps=20)
    assert 1.5 * x * x < 1e-3
    assert records[0].moved


@every_family
@pytest.mark.parametrize("value", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("begun", [False, True])
def test_at_its_bound_a_loss_has_nothing_to_gain(family: Any, value: float, begun: bool) -> None:
    policy = family()
    state = policy.init()
    if begun:
        _, state = policy.step(state, loss=0.5, slope=1.0, trial=lambda a: 0.5 * (1.0 - a) ** 2)
    record, after = policy.step(state, loss=0.0, slope=1e-22, trial=lambda a: value)
    assert (record.outcome, record.step_size, record.trials) == (Outcome.at_lower_bound, 0.0, 1 + (value == 0.0))
    assert after == state


@every_family
def test_a_loss_that_falls_for_ever_takes_a_finite_step(family: Any) -> None:
    _, records, _ = descend(family(lower_bound=None), lambda x: -x, lambda x: -1.0, 1.0, steps=50)
    assert all(math.isfinite(r.step_size) and r.trials <= 41 for r in records)


def test_a_cap_holds_for_trials_without_a_bound() -> None:
    tried: list[float] = []

    def trial(a: float) -> float:
        tried.append(a)
        return -3.0 - a

    record, _ = SLS(lower_bound=None).step(SLS(lower_bound=None).init(), loss=-3.0, slope=1.0, trial=trial, cap=7.0)
    assert max(tried) == record.step_size == 7.0


# Searches whose loss does not fall along d as <g, d> says.

ROUNDINGS = {"bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def rounded(value: float, unit: float) -> float:
    """Return the number with a relative rounding of that unit."""
    size = 2.0 ** math.floor(math.log2(abs(value))) * unit if value else 1.0
    return round(value / size) * size


@every_family
@pytest.mark.parametrize("unit", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize(("x", "wrong"), [(1.0, -1.0), (-30.0, -0.5), (0.5, -4.0)])
@pytest.mark.parametrize("low", [0.0, None])
def test_a_wrong_gradient_is_a_failed_search_in_every_dtype(
    family: Any, unit: float, x: float, wrong: float, low: float | None
) -> None:
    def f(x: float) -> float:
        return rounded(x * x + 2.0, unit)

    g = 2.0 * x * wrong
    policy = family(lower_bound=low)
    record, state = policy.step(policy.init(), loss=f(x), slope=g * g, trial=lambda a: f(x - a * g), rounding=unit)
    assert (record.outcome, record.step_size) == (Outcome.search_failed, 0.0)
    assert state == policy.init()


@every_family
@pytest.mark.parametrize("unit", [ROUNDINGS["float32"], ROUNDINGS["float64"]])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3, 1e6])
def test_near_a_solution_no_search_fails(family: Any, unit: float, start: float) -> None:
    """A curvature of 1e4 beside a loss of 1: what any step can gain is lost in the rounding of the loss."""

    def f(x: float) -> float:
        return rounded(1.0 + 0.5e4 * x * x, unit)

    x = 0.1 * math.sqrt(unit / 0.5e4)
    g = 1e4 * x
    policy = family(**{"start" if family is SLS else "bound": start})
    record, _ = policy.step(policy.init(), loss=f(x), slope=g * g, trial=lambda a: f(x - a * g), rounding=unit)
    assert record.outcome != Outcome.search_failed
