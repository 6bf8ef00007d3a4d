"""BiSLS and BiSPS on random convex quadratics: what the rules promise, checked at every step."""

from __future__ import annotations

import itertools
import math
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_bilevel import SPSB, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import EXACT, Traced, iterate, lower_search
from tests.problems import random_qb

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease", "ignore:.*no_descent")

FIRST_TRIALS = (1e-2, 1e3, None)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.filterwarnings("ignore:.*slope is negative")
def test_the_bars(direction: str) -> None:
    """No divergence, no failed search, at most 3 % no-descent, at most 1.6 trials per iteration, progress."""
    outcomes, trials, gaps = [], [], []
    for seed, (mu, T, lr) in enumerate(itertools.product((0.2, 0.01), (1, 6), FIRST_TRIALS)):
        problem = random_qb(seed, mu)
        start, point = problem.F(problem.x0), problem.instance()
        inner, solver = lower_search(point.y), CG(max_iterations=50, tolerance=(0.1, 0.01, 0.0, 0.1)[seed % 4])
        outer = BiSLS([point.x], lr, lower=inner, direction=direction, solver=solver)
        for _ in range(15):
            record = iterate(inner, outer, point, T, solver)
            value = problem.F(point.x.detach())
            assert math.isfinite(value)
            assert value <= 10 * start
            outcomes.append(record.outcome)
            trials.append(record.trials)
        gaps.append(value / start)
    assert outcomes.count(Outcome.search_failed) == 0
    assert outcomes.count(Outcome.no_descent) <= 0.03 * len(outcomes)
    assert mean(trials) <= 1.6
    assert max(gaps) < 1.0


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("lr", [*FIRST_TRIALS, 1e5])
def test_the_certified_value_is_never_above_the_present_one(direction: str, lr: float | None) -> None:
    for seed in range(3):
        point = random_qb(seed).instance()
        inner = lower_search(point.y)
        outer = BiSLS([point.x], lr, lower=inner, direction=direction)
        for _ in range(10):
            inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y]))
            before = float(outer.step(point.upper))
            record: Any = outer.record
            assert not record.moved or record.value <= before - 0.1 * record.step_size * record.slope + 1e-12


@pytest.mark.parametrize(("response", "baseline"), [("tangent", ""), ("step", "paper"), ("step", "matched")])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_acceptance_recomputed(response: str, direction: str, baseline: str) -> None:
    """Property 6: an accepted trial satisfies (14), every one before it does not; if none is, x is unchanged."""
    c, seen = 0.5, set()
    cls: Any = OneStepBiSLS if response == "step" else BiSLS
    options: dict[str, Any] = {"baseline": baseline, "max_trials": 12}
    if response == "tangent":
        options = {"momentum": "auto" if direction == "adam" else False, "carry": False, "curvature": math.inf}
    for seed in range(4):
        problem = random_qb(seed)
        point = problem.instance()
        inner = lower_search(point.y)
        outer = cls(
            [point.x],
            100.0,
            lower=inner,
            direction=direction,
            c=c,
            lower_bound=None,
            **options,
        )
        for _ in range(6):
            inner.step(point.lower)
            beta = inner.record.step_size
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            upper = Traced(point.upper, [point.x, point.y])
            x0, y0 = point.x.detach().clone(), point.y.detach().clone()
            outer.step(upper)
            record: Any = outer.record
            steps = [record.proposed * 0.5 ** (i - record.trials + 1) for i in range(record.trials)]
            first = 1 + (baseline == "matched")  # a failed search may look at the closure after the trials
            trials = list(zip(upper.points, upper.values, strict=True))[first : first + record.trials]
            reference = upper.values[1] if (response, baseline) == ("step", "matched") else upper.values[0]
            for i, (step, ((x, y), value)) in enumerate(zip(steps, trials, strict=True)):
                if response == "step":
                    assert torch.allclose(y, y0 - beta * problem.gradient_y(x, y0))
                assert value == pytest.approx(float(problem.f(x, y)), rel=1e-12)
                passes = value <= reference - c * step * record.slope
                assert passes == (i == record.trials - 1 and record.moved)
            assert torch.equal(point.y, y0)
            if record.moved and direction == "sgd":
                assert torch.equal(point.x, trials[-1][0][0])
            if not record.moved:
                assert torch.equal(point.x, x0)
            seen.add(record.outcome)
            assert len(upper.points) - first - record.trials in ((0,) if record.moved else (0, 1))
    assert Outcome.accepted in seen
    assert response == "step" or Outcome.search_failed not in seen


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    mu=st.sampled_from([0.01, 0.2, 1.0]),
    lr=st.sampled_from(FIRST_TRIALS),
    direction=st.sampled_from(["sgd", "adam"]),
)
def test_descent_if_y_is_exact(seed: int, mu: float, lr: float | None, direction: str) -> None:
    """Property 6: with exact y, exact P and no momentum, phi is F along the direction, so F never rises."""
    torch.set_default_dtype(torch.float64)
    problem = random_qb(seed, mu)
    point = problem.instance()
    inner = lower_search(point.y)
    options: dict[str, Any] = {"betas": (0.0, 0.999), "pace": "every", "solver": EXACT, "carry": False}
    outer: Any = BiSLS([point.x], lr, lower=inner, direction=direction, **options)
    inner.step(point.lower)
    value = problem.F(point.x.detach())
    for _ in range(8):
        with torch.no_grad():
            point.y.copy_(problem.ystar(point.x))
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
        outer.step(point.upper, point.lower)
        record, before, value = outer.record, value, problem.F(point.x.detach())
        assert record.outcome in (Outcome.accepted, Outcome.at_bound)
        assert record.slope_ratio == pytest.approx(1.0, rel=1e-6)
        assert value == pytest.approx(record.value, rel=1e-7)
        assert value <= before - 0.1 * record.step_size * record.slope + 1e-9 * abs(before)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    lr=st.floats(1e-3, 10.0),
    share=st.floats(0.0, 1.0),
    T=st.integers(1, 4),
    decay=st.sampled_from(["inverse", "inverse_sqrt", "constant"]),
)
def test_bisps_stays_in_its_envelope(seed: int, lr: float, share: float, T: int, decay: Any) -> None:
    """Property 7: alpha_l,k <= alpha_k <= alpha_b,k, and beta_b,k is constant within an upper iteration."""
    torch.set_default_dtype(torch.float64)
    factor = {"inverse": lambda k: 1 / (k + 1), "inverse_sqrt": lambda k: (k + 1) ** -0.5, "constant": lambda k: 1.0}
    problem = random_qb(seed)
    point = problem.instance()
    inner: Any = SPSB([point.y], lr=0.5, decay=decay, lower_bound=None)
    outer: Any = BiSPS([point.x], lr=lr, lr_min=share * lr, lower=inner)
    for k in range(4):
        solution = problem.ystar(point.x.detach())
        best = float(problem.g(point.x.detach(), solution))
        for _ in range(T):
            distance = float((point.y.detach() - solution).norm())
            inner.step(point.lower, lower_bound=best)
            assert inner.record.bound == pytest.approx(0.5 * factor[decay](k))
            assert inner.record.step_size <= inner.record.bound
            assert float((point.y.detach() - solution).norm()) <= distance * (1 + 1e-9) + 1e-9
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
        f, h, x = (
            problem.f(point.x.detach(), point.y.detach()),
            implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0],
            point.x.detach().clone(),
        )
        outer.step(point.upper)
        raw = float(f / (h @ h))
        expected = min(max(share * lr, raw * math.sqrt(k + 1)), lr) / math.sqrt(k + 1)
        assert outer.record.step_size == pytest.approx(expected)
        assert torch.allclose(point.x.detach(), x - expected * h)


def test_the_lower_clock_counts_upper_steps_that_move() -> None:
    point = random_qb(0).instance()
    inner: Any = SPSB([point.y], lr=0.5, lower_bound=-100.0)
    outer: Any = BiSPS([point.x], lr=1.0, lower=[inner])
    for h, clock in ((1.0, 1), (0.0, 1), (math.nan, 1), (1.0, 2)):
        inner.step(point.lower)
        point.x.grad = torch.full_like(point.x, h)
        outer.step(point.upper)
        assert inner.clock == clock


def test_a_first_search_finds_the_length_from_a_trial_that_is_too_short() -> None:
    problem = random_qb(0)
    point = problem.instance()
    inner = lower_search(point.y)
    outer = BiSLS([point.x], 1e-3, lower=inner, solver=EXACT)
    records: list[Any] = []
    for _ in range(25):
        inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
        outer.step(point.upper)
        records.append(outer.record)
    up = records[0].trials - 3  # beside the first trial, one did not pass, and the one before was tried again
    assert up >= 5
    assert records[0].step_size == pytest.approx(1e-3 * 2.0**up)
    starts = [record.step_size * 2.0 ** (record.trials - 1) for record in records[1:]]
    growth = [start / record.step_size for start, record in zip(starts, records, strict=False)]
    assert growth[0] <= 1.2 + 1e-9
    assert max(growth) <= 2.0 + 1e-9  # where steps have outgrown what was rejected


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_at_a_solution_nothing_is_searched_or_solved(direction: str) -> None:
    """Single precision: the decrease to be had is soon below the rounding of f."""
    problem = random_qb(0)
    point = problem.instance()
    inner = lower_search(point.y)
    outer = BiSLS([point.x], lower=inner, solver=EXACT, direction=direction)

    def upper() -> torch.Tensor:
        return point.upper().float()

    unsearched: list[float] = []
    for _ in range(200):
        inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
        before = outer.evaluations.lower.hvps
        outer.step(upper)
        record: Any = outer.record
        if record.outcome == Outcome.kept:
            unsearched.append(record.step_size)
            assert outer.evaluations.lower.hvps == before
    assert len(unsearched) > 25
    assert len(set(unsearched[-20:])) == 1  # nothing was learned from rounding
    start, end = problem.F(problem.x0), problem.F(point.x.detach())
    assert float(problem.dF(point.x.detach()).norm()) < 1e-3 * float(problem.dF(problem.x0).norm())
    assert end < start
