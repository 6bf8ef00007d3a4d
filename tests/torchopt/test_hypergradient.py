"""The hypergradient that reaches the upper step, and the solver of the response that goes with it."""

from __future__ import annotations

import pytest
import torch

import adaptive_bilevel as ab
from tests.problems import Problem, b1, b2, ridge_hpo, softmax_toy
from tests.torchopt.modules import SOLVE, iterate, pair

SOLVERS = {
    "default": None,
    "cg": SOLVE.solve_cg(rtol=1e-12),
    "normal-cg": SOLVE.solve_normal_cg(rtol=1e-12),
    "dense": SOLVE.solve_inv(),
    "neumann": SOLVE.solve_inv(ns=True, maxiter=300, alpha=0.45),
    "own": lambda matvec, b: SOLVE.solve_cg(rtol=1e-12)(matvec, b),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("problem", [b1(), b2(), ridge_hpo(), softmax_toy()], ids=lambda p: p.name)
def test_hypergradient_that_reaches_the_step_is_the_closed_form(problem: Problem, name: str) -> None:
    inner, meta, x = pair(problem, linear_solve=SOLVERS[name], T=1, lower={"lower_bound": None, "lr": 1e-3})
    inner.y.data.copy_(problem.ystar(x.detach()))
    expected = problem.dF(x.detach())
    iterate(inner, meta)
    assert x.grad is not None
    assert (x.grad - expected).norm() <= 1e-5 * expected.norm()
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-3), "the response is solved as TorchOpt solves"


def test_the_upper_loss_is_differentiated_with_the_lower_variable_fixed() -> None:
    problem = b2()  # f depends on x directly, too
    inner, meta, x = pair(problem, direction="sgd")
    at = x.detach().clone()
    inner.solve()
    y = inner.y.detach().clone()
    meta.step(inner.val)
    f_x, f_y = torch.func.grad(problem.f, argnums=(0, 1))(at, y)
    h = problem.hypergradient(at, y)
    w = torch.linalg.solve(problem.hessian(at, y), problem.cross(at, y).T @ h)
    assert meta.record.slope == pytest.approx(float(f_x @ h - f_y @ w), rel=1e-9)
    assert (f_x - h).norm() > 0.1 * h.norm(), "else the total gradient would pass, too"


def test_the_solver_is_of_the_declared_kind_unless_one_is_given() -> None:
    for name, kind in {
        "default": "NormalCG",
        "cg": "CG",
        "dense": "Dense",
        "neumann": "SafeNeumann",
        "own": "Called",
    }.items():
        inner, meta, _ = pair(ridge_hpo(), linear_solve=SOLVERS[name])
        iterate(inner, meta)
        assert type(meta.optimizer.solver).__name__ == kind
    inner, meta, _ = pair(ridge_hpo(), solver=ab.hypergradient.CG(max_iterations=7))
    iterate(inner, meta)
    assert meta.optimizer.solver == ab.hypergradient.CG(max_iterations=7)


@pytest.mark.parametrize("name", ["default", "cg"])
def test_lanczos_answers_where_it_is_given(name: str) -> None:
    inner, meta, _ = pair(ridge_hpo(), solver=ab.hypergradient.Lanczos(), linear_solve=SOLVERS[name])
    products = []
    for k in range(3):
        before = meta.evaluations.lower.hvps
        iterate(inner, meta)
        products.append(meta.evaluations.lower.hvps - before)
        error = 1e-2 if k < 2 else 0.3  # the third step has the inverse of the second
        assert meta.record is not None and meta.record.slope_ratio == pytest.approx(1.0, rel=error)
        assert meta.optimizer.hessian is not None and meta.optimizer.hessian.smallest > 0.0
    assert 0 < products[0] == products[1] <= 11 and products[2] <= 1


RIDGES = {
    "cg": SOLVE.solve_cg(ridge=0.3),
    "normal-cg": SOLVE.solve_normal_cg(ridge=0.3),
    "neumann": SOLVE.solve_inv(ns=True, alpha=0.2, maxiter=200, ridge=0.3),
    "dense": SOLVE.solve_inv(ridge=0.3),
}


@pytest.mark.parametrize("name", RIDGES)
def test_a_ridge_is_kept(name: str) -> None:
    problem = ridge_hpo()
    inner, meta, _ = pair(problem, linear_solve=RIDGES[name], T=30)
    iterate(inner, meta)
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-3)
