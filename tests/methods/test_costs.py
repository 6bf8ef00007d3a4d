"""What an iteration of each row costs, count by count."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_bilevel import policies
from adaptive_bilevel.hypergradient import CG, Implicit, Neumann, Unroll
from tests.methods.helpers import EXACT, Drawn, run
from tests.problems import b2, random_qb

T, R, Q = 4, 3, 5
SUM = Implicit(Neumann(Q, 0.2))
# name: options, (values of f, gradients of f, values of g, gradients of g, HVPs, JVPs); d_x = 2, d_y = 3
LOOP: dict[str, Any] = {"lower_steps": T}
COSTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ba": (LOOP, (0, 1, 0, T, 3, 1)),
    "bsa": ({**LOOP, "solver": "drawn"}, (0, 1, 0, T, 2, 1)),
    "aid-bio": ({**LOOP, "solver": CG(2, 0.0, warm_start=True)}, (0, 1, 0, T, 3, 1)),  # +1 product: v_0 != 0
    "stocbio": ({**LOOP, "estimator": SUM}, (0, 1, 0, T, Q, 1)),
    "alset": ({"solver": "drawn"}, (0, 1, 0, 1, 2, 1)),
    "ttsa": ({"solver": "drawn"}, (0, 1, 0, 1, 2, 1)),
    "stable": ({"estimator": EXACT}, (0, 1, 0, 1, 2 * 3, 2)),  # H^{-1} twice, one JVP in each direction
    "sustain": ({"estimator": SUM}, (0, 2, 0, 2, 2 * Q, 2)),
    "mrbo": ({"estimator": SUM}, (0, 2, 0, 2, 2 * Q, 2)),
    "vrbo": ({**LOOP, "estimator": SUM}, (0, 2, 0, 2 * T, 2 * Q, 2)),
    "fsla": ({}, (0, 2, 0, 1, 1, 2)),
    "soba": ({}, (0, 1, 0, 1, 1, 1)),
    "saba": ({}, (0, 1, 0, 1, 1, 1)),
    "srba": ({}, (0, 2, 0, 2, 2, 2)),
    "amigo": ({**LOOP, "auxiliary_steps": R}, (0, 1, 0, T, R, 1)),
    "pzobo": (LOOP, (0, 1, 0, (5 + 1) * T, 0, 0)),
    "hozog": (LOOP, (5 + 1, 0, 0, (5 + 1) * T, 0, 0)),
    "unroll": (LOOP, (0, 1, 0, T, T, T)),
    "unroll-forward": (LOOP, (0, 1, 0, T, 2 * T, 2 * T)),
    "unroll-truncated": ({**LOOP, "estimator": Unroll(last=2)}, (0, 1, 0, T, 2, 2)),
    "darts": ({}, (0, 1, 0, 3 + 1, 0, 0)),
    "s-tfbo": ({}, (0, 1, 0, 1, 1, 1)),
    "d-tfbo": ({"until": "", **LOOP, "auxiliary_steps": R}, (0, 1, 0, T, R, 1)),
    "bisps": (
        {**LOOP, "estimator": SUM, "lower_step": policies.SPSB(lower_bound=-100.0, bound=0.1)},
        (0, 1, 0, T, Q, 1),
    ),
    "f2sa": (LOOP, (0, T + 1, 0, 2 * T + 2, 0, 0)),
    "pgdo": (LOOP, (0, 1, 0, T + 2, 0, 0)),
    "bome": (LOOP, (0, 1, 0, T + 2, 0, 0)),
    "primal-dual": (LOOP, (0, 1, 0, T + 2, 0, 0)),
}


def counts(evaluations: Any) -> tuple[int, ...]:
    upper, lower = evaluations.upper, evaluations.lower
    assert upper.hvps == upper.jvps == 0
    return upper.values, upper.gradients, lower.values, lower.gradients, lower.hvps, lower.jvps


@pytest.mark.parametrize("name", COSTS)
def test_cost_of_an_iteration(name: str) -> None:
    options, expected = COSTS[name]
    if options.get("solver") == "drawn":
        options = {**options, "solver": Drawn(2, 2, 2)}
    records = run(name, b2(), 3, **options)
    assert counts(records[-1].evaluations) == expected
    whole = [sum(column) for column in zip(*(counts(r.evaluations) for r in records), strict=True)]
    assert counts(records[-1].total) == tuple(whole)


def test_cost_of_d_tfbo_with_its_stop() -> None:
    """P + 1 gradients and Q + 1 products: the last ones see that it is time to stop."""
    for record in run("d-tfbo", b2(), 5):
        P, steps = (len(record.records[name]) for name in "yv")
        assert counts(record.evaluations) == (0, 1, 0, P + 1, steps + 1, 1)


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize(("baseline", "more"), [("paper", 0), ("matched", 1)])
def test_cost_of_bisls_in_paper_mode(baseline: str, more: int) -> None:
    """T (1 g + r f), the hypergradient, then a lower gradient and an f per trial (and once more for the baseline)."""
    search: dict[str, Any] = {"decay": "constant", "lower_bound": None, "shrink": 0.6}
    records = run(
        "bisls-sgd",
        b2(),
        4,
        estimator=SUM,
        response="step",
        baseline=baseline,
        lower_steps=T,
        lower_step=policies.SLSB(bound=1.0, **search),
        upper_step=policies.SLSB(bound=1.0, c=0.1, **search),
    )
    for record in records:
        lower, (upper,) = sum(r.trials for r in record.records["y"]), record.records["x"]
        expected = (upper.trials + more, 1, lower, T + upper.trials + more, Q, 1)
        assert counts(record.evaluations) == expected


def test_cost_of_bisls_along_the_tangent() -> None:
    """One value of f per trial; a lower graph, one JVP and the solve for w; one lower gradient per certificate."""
    solver = CG(2, 0.0)
    steps = {"lower_step": policies.SLS(start=10.0, lower_bound=None), "upper_step": policies.SLS(c=0.5)}
    for record in run("bisls-sgd", random_qb(1), 5, solver=solver, lower_steps=T, carry=False, **steps):
        lower, (upper,) = sum(r.trials for r in record.records["y"]), record.records["x"]
        certified = record.evaluations.lower.gradients - T - 1
        assert 1 <= certified <= upper.trials
        assert counts(record.evaluations) == (upper.trials, 1, lower, T + 1 + certified, 2 * 2, 2)
