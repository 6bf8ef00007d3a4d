"""The estimators against the reference's numbers on b2, and their identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    implicit,
    linear_residual,
)
from tests.hypergradient.helpers import B2, GOLDEN, SAMPLE, at, close, estimate, oracle_of, unrolled
from tests.methods.helpers import Drawn
from tests.problems import PROBLEMS, Problem, b1, b2, random_qb, ridge_hpo, softmax_toy

SOLVERS: dict[str, Any] = {
    "exact": Exact(),
    "identity_scaled_1/L": None,
    "identity": Identity(1.0),
    "cg1": CG(1, 0.0),
    "cg2": CG(2, 0.0),
    "cg3": CG(3, 0.0),
    **{f"neumann_sum{q}_e0.2": Neumann(steps=q, scale=0.2) for q in (0, 1, 5, 20)},
    **{f"neumann_rand_N3_nbar{n}_e0.2": Drawn(n, scale=0.2) for n in range(3)},
    "mean_neumann_rand_N3": Neumann(steps=2, scale=0.2),
}
UNROLLED: dict[str, tuple[Any, int]] = {
    **{f"unroll_rev_T{t}": (Unroll(), t) for t in (1, 2, 5)},
    **{f"unroll_fwd_T{t}": (UnrollForward(), t) for t in (1, 2, 5)},
    "unroll_T5_trunc2": (Unroll(last=2), 5),
    "pzobo_T5_axis": (PZOBO(probes="axes", radius=1e-3), 5),
}


# ----------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("key", SOLVERS)
def test_implicit_estimators(key: str) -> None:
    solver = Identity(0.2) if SOLVERS[key] is None else SOLVERS[key]
    assert close(estimate(Implicit(solver), b2()), B2[key])


@pytest.mark.parametrize("key", UNROLLED)
def test_unrolled_estimators(key: str) -> None:
    estimator, steps = UNROLLED[key]
    assert close(unrolled(estimator, b2(), steps, 0.2), B2[key])


def test_darts_and_exact_away_from_the_solution() -> None:
    point = at(b2(), solved=False)
    assert close(estimate(DARTS(step=0.2), b2(), point), B2["darts_fd"])
    assert close(estimate(Implicit(Exact()), b2(), point), B2["exact_at_y0"])
    assert close(b2().ystar(b2().x0), GOLDEN["B2_point"]["ystar"])


def test_every_estimator_of_the_reference_is_tested() -> None:
    assert {*SOLVERS, *UNROLLED, "darts_fd", "exact_at_y0"} == set(B2)


# --------------------------------------------------------------------------------------------------------- identities


@given(seed=st.integers(0, 100), terms=st.integers(1, 8))
@settings(max_examples=15)
def test_the_sum_is_the_mean_of_the_random_terms(seed: int, terms: int) -> None:
    problem = random_qb(seed)
    scale = 1.0 / float(torch.linalg.eigvalsh(problem.hessian(problem.x0, problem.y0))[-1])
    total = estimate(Implicit(Neumann(steps=terms - 1, scale=scale)), problem)
    drawn = [estimate(Implicit(Drawn(n, terms=terms, scale=scale)), problem) for n in range(terms)]
    assert close(torch.stack(drawn).mean(0), total, 1e-8)


@given(seed=st.integers(0, 100), steps=st.integers(1, 6))
@settings(max_examples=15)
def test_unrolling_from_the_solution_is_a_neumann_sum(seed: int, steps: int) -> None:
    problem = random_qb(seed)
    b = 1.0 / float(torch.linalg.eigvalsh(problem.hessian(problem.x0, problem.y0))[-1])
    solution = problem.ystar(problem.x0)
    whole = unrolled(Unroll(), problem, steps, b, solution)
    assert close(whole, estimate(Implicit(Neumann(steps=steps - 1, scale=b)), problem), 1e-8)
    assert close(whole, unrolled(UnrollForward(), problem, steps, b, solution), 1e-10)
    assert close(unrolled(Unroll(last=steps), problem, steps + 3, b, solution), whole, 1e-8)


@pytest.mark.parametrize("make", [b2, ridge_hpo, softmax_toy], ids=lambda f: f.__name__)
def test_unrolling_is_the_derivative_of_the_loop(make: Any) -> None:
    problem, steps, b = make(), 4, 0.1

    def through(x: Tensor) -> Tensor:
        y = problem.y0.clone().requires_grad_()
        for _ in range(steps):
            (g,) = torch.autograd.grad(problem.g(x, y), y, create_graph=True)
            y = y - b * g
        return problem.f(x, y)

    expected = torch.autograd.functional.jacobian(through, problem.x0)
    assert close(unrolled(Unroll(), problem, steps, b), expected, 1e-10)
    assert close(unrolled(UnrollForward(), problem, steps, b), expected, 1e-10)
    # with axes PZOBO is a forward difference of the loop, HOZOG one of F_T
    assert close(unrolled(PZOBO(probes="axes", radius=1e-5), problem, steps, b), expected, 1e-4)
    assert close(unrolled(HOZOG(probes="axes", radius=1e-5), problem, steps, b), expected, 1e-3)


@pytest.mark.parametrize("make", [b1, b2, ridge_hpo, softmax_toy], ids=lambda f: f.__name__)
def test_exact_is_the_gradient_of_F(make: Any) -> None:
    problem: Problem = make()
    h, step = estimate(Implicit(Exact()), problem), 1e-5
    assert close(h, problem.dF(problem.x0), 1e-9)
    for i in range(min(3, problem.x0.numel())):
        e = torch.zeros_like(problem.x0)
        e.view(-1)[i] = step
        slope = (problem.F(problem.x0 + e) - problem.F(problem.x0 - e)) / (2 * step)
        assert float(h.view(-1)[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@given(seed=st.integers(0, 100), iterations=st.integers(1, 4))
@settings(max_examples=15)
def test_the_error_of_cg_in_the_norm_of_H(seed: int, iterations: int) -> None:
    problem = random_qb(seed)
    H, fy = problem.hessian(problem.x0, problem.y0), torch.randn(4)
    eigenvalues = torch.linalg.eigvalsh(H)
    root = math.sqrt(float(eigenvalues[-1] / eigenvalues[0]))
    exact = torch.linalg.solve(H, fy)
    (v,) = CG(iterations, 0.0).solve(lambda u: (H @ u[0],), (fy,)).tensors
    error, first = v - exact, exact
    bound = 2 * ((root - 1) / (root + 1)) ** iterations
    assert float(error @ H @ error) ** 0.5 <= bound * float(first @ H @ first) ** 0.5 + 1e-10


def test_the_amortised_estimate_with_the_solution_is_exact() -> None:
    problem = b2()
    point = at(problem)
    v = Implicit(Exact())(oracle_of(problem), point, SAMPLE).v
    assert v is not None
    tracked = point._replace(v=v)
    assert close(estimate(Amortised(), problem, tracked), B2["exact"])
    upper, lower = linear_residual(oracle_of(problem), tracked, SAMPLE)
    assert float((upper[0] + lower[0]).norm()) < 1e-12


@pytest.mark.parametrize(("multiplier", "error"), [(10.0, 6.6e-2), (100.0, 8.1e-3), (1000.0, 8.2e-4)])
def test_the_bias_of_the_value_function(multiplier: float, error: float) -> None:
    """With y the minimizer of f + lambda g, the error at the optimum is O(1/lambda); values of the reference."""
    problem = b2()
    data_x = problem.x0.clone()
    for _ in range(2):  # Newton's method to the optimum of F, a quadratic
        H = torch.autograd.functional.jacobian(lambda x: problem.hypergradient(x, problem.ystar(x)), data_x)
        data_x = data_x - torch.linalg.solve(H, problem.dF(data_x))
    y = problem.y0.clone()
    merit = lambda y: problem.f(data_x, y) + multiplier * problem.g(data_x, y)  # noqa: E731
    H = torch.autograd.functional.hessian(merit, y)
    y = y - torch.linalg.solve(H, torch.func.grad(merit)(y))
    point = Point((data_x,), (y,), z=(problem.ystar(data_x),), multiplier=multiplier)
    assert float(estimate(ValueFunction(), problem, point).norm()) == pytest.approx(error, rel=0.1)


def test_probes_have_the_identity_as_covariance() -> None:
    problem = random_qb(0)
    point = at(problem)
    for estimator in (PZOBO(directions=4000), HOZOG(directions=4000)):
        us = torch.stack([u[0] for u in estimator._draw(point, Sample(seed=3), unit=isinstance(estimator, HOZOG))])
        assert torch.allclose(us.T @ us / len(us), torch.eye(3), atol=0.1)


def test_averaged_is_exact_on_a_deterministic_problem() -> None:
    problem, oracle = b2(), oracle_of(b2())
    memory: Any = None
    for shift in range(3):
        point = at(problem, x=problem.x0 + shift)._replace(memory=memory)
        found = Averaged(0.9)(oracle, point, SAMPLE)
        memory = found.memory
        assert close(found.hypergradient[0], problem.dF(problem.x0 + shift), 1e-9)


def test_averaged_remembers() -> None:
    """On changing samples H_k is the recursion, written down plainly."""
    Hs, w = [torch.diag(torch.tensor([1.0, 2.0])) * s for s in (1.0, 3.0, 2.0)], 0.5
    oracle = Oracle(
        lambda x, y, _: y[0].sum() + x[0].sum(), lambda x, y, H: 0.5 * y[0] @ H @ y[0] * (1 + y[0].sum()) - x[0] @ y[0]
    )
    memory: Any = None
    points = [Point((torch.ones(2),), (torch.full((2,), float(k)),)) for k in range(3)]
    expected, estimates = torch.zeros(2, 2), []
    hessian = lambda p, H: oracle_hessian(p.y[0], H)  # noqa: E731
    for k, (point, H) in enumerate(zip(points, Hs, strict=True)):
        found = Averaged(w)(oracle, point._replace(memory=memory), Sample(lower=H))
        memory = found.memory
        here = hessian(point, H)
        expected = here if k == 0 else here + w * (expected - hessian(points[k - 1], H))
        estimates.append(close(memory["H"], expected))
    assert all(estimates)


def oracle_hessian(y: Tensor, H: Tensor) -> Tensor:
    found: Tensor = torch.func.hessian(lambda y: 0.5 * y @ H @ y * (1 + y.sum()))(y)
    return found


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda f: f.__name__)
def test_implicit_is_the_function_of_the_same_name(make: Any) -> None:
    problem: Problem = make()
    solver = CG(8, 0.0)
    leaf = problem.instance(solved=True)
    expected = implicit(leaf.upper, leaf.lower, [leaf.x], [leaf.y], solver)[0]
    assert close(estimate(Implicit(solver), problem), expected, 1e-12)


def test_a_warm_start_is_taken_from_the_point() -> None:
    problem = b2()
    cold = Implicit(CG(1, 0.0, warm_start=True))
    v = Implicit(Exact())(oracle_of(problem), at(problem), SAMPLE).v
    assert v is not None
    assert close(estimate(cold, problem), B2["cg1"])
    assert close(estimate(cold, problem, at(problem)._replace(v=v)), B2["exact"])
