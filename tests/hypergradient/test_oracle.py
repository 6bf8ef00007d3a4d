"""The oracle: what each estimator costs, what is asked for once, and the losses that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel.errors import ClosureError
from adaptive_bilevel.hypergradient import (
    CG,
    DARTS,
    HOZOG,
    PZOBO,
    Amortised,
    Averaged,
    Exact,
    Identity,
    Implicit,
    Neumann,
    Oracle,
    Sample,
    Unroll,
    UnrollForward,
    ValueFunction,
    descend,
    linear_residual,
)
from tests.hypergradient.helpers import SAMPLE, at, oracle_of
from tests.problems import b2

T, Q = 4, 5
COSTS: dict[str, tuple[Any, int, tuple[int, ...]]] = {
    # estimator, lower steps before it, (values of f, gradients of f, gradients of g, HVPs, JVPs)
    "exact": (Implicit(Exact()), 0, (0, 1, 0, 3, 1)),
    "cg": (Implicit(CG(2, 0.0)), 0, (0, 1, 0, 2, 1)),
    "neumann-sum": (Implicit(Neumann(Q, 0.2)), 0, (0, 1, 0, Q, 1)),
    "identity": (Implicit(Identity(1.0)), 0, (0, 1, 0, 0, 1)),
    "amortised": (Amortised(), 0, (0, 1, 0, 0, 1)),
    "unroll": (Unroll(), T, (0, 1, T, T, T)),
    "unroll-forward": (UnrollForward(), T, (0, 1, T, 2 * T, 2 * T)),
    "truncated": (Unroll(last=2), T, (0, 1, T, 2, 2)),
    "darts": (DARTS(0.2), 0, (0, 1, 3, 0, 0)),
    "pzobo": (PZOBO(directions=3), T, (0, 1, (3 + 1) * T, 0, 0)),
    "hozog": (HOZOG(), T, (2, 0, 2 * T, 0, 0)),
    "value-function": (ValueFunction(), 0, (0, 1, 2, 0, 0)),
    "averaged": (Averaged(), 0, (0, 1, 0, 3, 3)),
}


@pytest.mark.parametrize("key", COSTS)
def test_costs_are_those_of_the_table(key: str) -> None:
    estimator, steps, expected = COSTS[key]
    problem = b2()
    oracle, point = oracle_of(problem), at(problem, solved=False)
    y, path = descend(oracle, point.x, point.y, steps, 0.2, SAMPLE)
    estimator(oracle, point._replace(y=y, path=path, z=(problem.ystar(problem.x0),), multiplier=1.0), SAMPLE)
    upper, lower = oracle.evaluations.upper, oracle.evaluations.lower
    assert (upper.values, upper.gradients, lower.gradients, lower.hvps, lower.jvps) == expected
    assert (lower.values, upper.hvps, upper.jvps) == (0, 0, 0)


def test_the_random_term_costs_half_on_average() -> None:
    problem, N = b2(), 9
    oracle = oracle_of(problem)
    for seed in range(200):
        Implicit(Neumann(N, 0.2, random=True))(oracle, at(problem), Sample(seed=seed))
    assert oracle.evaluations.lower.hvps / 200 == pytest.approx((N - 1) / 2, rel=0.1)


def test_the_same_thing_at_the_same_point_is_asked_for_once() -> None:
    problem = b2()
    oracle, point = oracle_of(problem), at(problem)._replace(v=(torch.ones(3),))
    Amortised()(oracle, point, SAMPLE)
    linear_residual(oracle, point, SAMPLE)
    oracle.lower_gradients(point.x, point.y, SAMPLE)
    oracle.lower_gradients(point.x, point.y, SAMPLE)
    counts = oracle.evaluations
    assert (counts.upper.gradients, counts.lower.gradients, counts.lower.hvps, counts.lower.jvps) == (1, 1, 1, 1)
    oracle.lower_gradients(point.x, (point.y[0].clone(),), SAMPLE)
    oracle.lower_gradients(point.x, point.y, Sample(seed=1))
    assert counts.lower.gradients == 3


@pytest.mark.parametrize("wrong", [lambda x, y, _: 1.0, lambda x, y, _: y[0], lambda x, y, _: y[0].sum().detach()])
def test_wrong_losses(wrong: Any) -> None:
    oracle = Oracle(wrong, wrong)
    x, y = (torch.ones(2),), (torch.ones(2),)
    with pytest.raises(ClosureError, match="upper_loss returned"):
        oracle.upper_gradients(x, y, SAMPLE)
    with pytest.raises(ClosureError, match="lower_loss returned"):
        oracle.lower_gradients(x, y, SAMPLE)


def test_random_numbers_inside_a_loss_belong_to_the_sample() -> None:
    oracle = Oracle(lambda x, y, _: (x[0] * torch.randn(3)).sum(), lambda x, y, _: (y[0] * torch.rand(3)).sum())
    x, y = (torch.ones(3),), (torch.ones(3),)
    state = torch.get_rng_state()
    values = [float(oracle.upper_value(x, y, Sample(seed=s))) for s in (1, 2, 1)]
    assert values[0] == values[2] != values[1]
    assert torch.equal(state, torch.get_rng_state())
