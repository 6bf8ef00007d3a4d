"""Estimators at the edges: pure, with nothing to differentiate, with a bad Hessian, with wrong options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from adaptive_bilevel.errors import AdaptiveBilevelWarning, OptionError, SolverError
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
    Point,
    Sample,
    Unroll,
    UnrollForward,
    ValueFunction,
    descend,
)
from tests.hypergradient.helpers import SAMPLE, at, close, estimate, oracle_of
from tests.problems import b2

ALL: tuple[Any, ...] = (
    *(Implicit(s) for s in (Exact(), CG(), Neumann(3, 0.2), Neumann(3, 0.2, random=True), Identity())),
    *(Amortised(), Unroll(), Unroll(last=1), UnrollForward(), DARTS(0.2), PZOBO(), HOZOG(), ValueFunction()),
)


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_estimators_are_pure(estimator: Any) -> None:
    """The same point and sample give the same bits; no tensor changes; torch's random numbers stay where they are."""
    problem = b2()
    oracle, point = oracle_of(problem), at(problem, solved=False)
    y, path = descend(oracle, point.x, point.y, 2, 0.2, SAMPLE)
    point = point._replace(y=y, path=path, z=point.y, v=(torch.ones(3),), multiplier=2.0)
    before, random = [t.clone() for t in (*point.x, *point.y, *point.z, *point.v)], torch.get_rng_state()
    sample = Sample(seed=5)
    first = estimator(oracle, point, sample).hypergradient
    estimator(oracle, point._replace(x=(point.x[0] + 1,)), Sample(seed=6))
    oracle.forget()
    second = estimator(oracle, point, sample).hypergradient
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, before, (*point.x, *point.y, *point.z, *point.v)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(t.grad is None and not t.requires_grad for t in (*point.x, *point.y))


@pytest.mark.parametrize("estimator", [Unroll(), Unroll(last=3), UnrollForward()], ids=str)
def test_without_lower_steps_unrolling_is_the_direct_part(estimator: Any) -> None:
    problem = b2()
    point = at(problem, solved=False)
    fx = torch.func.grad(problem.f)(problem.x0, problem.y0)
    assert close(estimate(estimator, problem, point), fx, 1e-14)


@pytest.mark.parametrize("estimator", [*(Implicit(s) for s in (Exact(), CG())), DARTS(0.2)], ids=str)
def test_where_f_does_not_use_y_it_is_the_direct_part(estimator: Any) -> None:
    problem = b2()
    oracle = Oracle(lambda x, y, _: x[0].square().sum(), lambda x, y, _: problem.g(x[0], y[0]))
    h = estimator(oracle, at(problem), SAMPLE).hypergradient
    assert close(h[0], 2 * problem.x0, 1e-14)


def test_negative_curvature_stops_cg_with_a_finite_estimate() -> None:
    oracle = Oracle(lambda x, y, _: y[0].sum() + x[0].sum(), lambda x, y, _: -y[0].square().sum() + x[0] @ y[0])
    point = Point((torch.ones(2),), (torch.ones(2),))
    with pytest.warns(AdaptiveBilevelWarning, match="negative curvature"):
        h = Implicit(CG())(oracle, point, SAMPLE).hypergradient
    assert close(h[0], torch.ones(2))


def test_a_neumann_series_that_grows_is_cut_and_said() -> None:
    with pytest.warns(AdaptiveBilevelWarning, match="made its vector grow"):
        h = estimate(Implicit(Neumann(50, 1.0)), b2())
    assert bool(h.isfinite().all())


def test_a_singular_hessian_has_no_exact_inverse() -> None:
    oracle = Oracle(lambda x, y, _: y[0].sum() + x[0].sum(), lambda x, y, _: y[0].sum() ** 2 + x[0] @ y[0])
    with pytest.raises(SolverError, match="singular"):
        Implicit(Exact())(oracle, Point((torch.ones(2),), (torch.ones(2),)), SAMPLE)


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_what_is_not_finite_stays_not_finite(estimator: Any) -> None:
    problem = b2()
    oracle = Oracle(lambda x, y, _: problem.f(x[0], y[0]) * math.nan, lambda x, y, _: problem.g(x[0], y[0]))
    point = at(problem, solved=False)
    y, path = descend(oracle, point.x, point.y, 1, 0.2, SAMPLE)
    point = point._replace(y=y, path=path, z=point.y, multiplier=1.0)
    found = estimator(oracle, point, SAMPLE)
    assert not bool(found.hypergradient[0].isfinite().all()) or not bool(found.loss.isfinite())


WRONG: list[tuple[Any, dict[str, Any]]] = [
    *((Implicit, {"solver": s}) for s in (CG, "cg", None)),
    *((Unroll, {"last": k}) for k in (0, -1, 1.5)),
    *((DARTS, {"step": s}) for s in (0.0, -1.0, math.inf)),
    (DARTS, {"step": 0.1, "radius": 0.0}),
    *((kind, {name: 0}) for kind, name in itertools.product((PZOBO, HOZOG), ("directions", "radius"))),
    (PZOBO, {"probes": "all"}),
    *((Averaged, {"weight": w}) for w in (0.0, 1.0, -0.5)),
]


@pytest.mark.parametrize(("kind", "options"), WRONG, ids=str)
def test_wrong_options_name_argument_and_value(kind: Any, options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(OptionError, match=rf"{kind.__name__}\({name}="):
        kind(**options)
