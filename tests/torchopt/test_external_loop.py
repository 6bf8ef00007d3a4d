"""Modules that keep a loop of their own, with an objective or with an optimality function only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import BiSPS
from adaptive_bilevel.errors import (
    LowerLevelError,
    OptionError,
    SolverError,
)
from adaptive_bilevel_torchopt import LowerStep, UpperStep
from tests.problems import Problem, b2, ridge_hpo
from tests.torchopt.modules import EXACT_CG, SOLVE, Base, implicit_module, iterate, leaf, stock


class OnlyOptimality(Base, linear_solve=SOLVE.solve_normal_cg(rtol=1e-12)):
    """A lower problem that is known by its optimality function, with a loop of its own."""

    def __init__(self, x: Tensor, problem: Problem, twist: float = 0.0) -> None:
        super().__init__()
        self.x, self.problem, self.twist = x, problem, twist
        self.y = nn.Parameter(problem.y0.clone())

    def optimality(self) -> tuple[Tensor, ...]:
        residual = torch.func.grad(self.problem.g, argnums=1)(self.x, self.y)
        return (residual + self.twist * torch.roll(self.y, 1),)

    def solve(self) -> None:
        self.y.data.copy_(self.problem.ystar(self.x.detach()))


def test_an_optimality_function_is_enough_for_the_response() -> None:
    problem = b2()
    x = leaf(problem)
    inner = OnlyOptimality(x, problem)
    with pytest.raises(OptionError, match=r"no objective\(\).*UpperStep\(lower=module\)"):
        LowerStep(inner)
    meta: Any = UpperStep([x], lower=inner)
    for _ in range(20):
        inner.y.detach_().requires_grad_()
        inner.solve()
        meta.step(lambda: problem.f(x, inner.y))
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-4)
    assert problem.dF(x.detach()).norm() < 0.05 * problem.dF(problem.x0).norm()


def test_an_optimality_function_that_is_no_gradient_is_refused_for_the_response_only() -> None:
    problem = b2()
    x = leaf(problem)
    inner = OnlyOptimality(x, problem, twist=1.0)
    meta: Any = UpperStep([x], lower=inner)
    inner.solve()
    with pytest.raises(SolverError, match="not symmetric"):
        meta.step(lambda: problem.f(x, inner.y))
    inner.y.detach_().requires_grad_()
    inner.solve()
    UpperStep([x], BiSPS, lower=inner).step(lambda: problem.f(x, inner.y))


def test_a_stock_loop_s_objective_is_known_from_its_solve() -> None:
    problem = ridge_hpo()
    inner, meta, x = stock(problem)
    other, meta2, x2 = stock(problem)
    for _ in range(10):
        iterate(inner, meta)
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
        iterate(other, meta2, lower_closure=other.objective)
    assert torch.equal(x, x2) and problem.F(x.detach()) < problem.F(problem.x0)


class Weighted(Base, linear_solve=EXACT_CG):
    """A lower problem whose objective is told a weight, as solve() is."""

    def __init__(self, x: Tensor, problem: Problem) -> None:
        super().__init__()
        self.x, self.problem = x, problem
        self.y = nn.Parameter(problem.ystar(x.detach()))

    def objective(self, weight: float, shift: float = 0.0) -> Tensor:
        return weight * self.problem.g(self.x, self.y) + shift * self.y.square().sum()

    def solve(self, weight: float, shift: float = 0.0) -> str:
        return f"{weight} {shift}"


def test_a_stock_loop_s_objective_gets_what_its_solve_got() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    inner = Weighted(x, problem)
    meta: Any = UpperStep([x], lower=inner)
    assert inner.solve(3.0, 0.7) == "3.0 0.7"
    meta.step(lambda: problem.f(x, inner.y))
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
    inner.solve(2.0)
    meta.step(lambda: problem.f(x, inner.y))
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)


def test_a_solve_that_was_not_seen_needs_the_closure() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    inner = implicit_module(EXACT_CG)(x, problem).solve()
    meta: Any = UpperStep([x], lower=inner)
    with pytest.raises(LowerLevelError, match=r"before there was an UpperStep.*lower_closure=lambda"):
        meta.step(inner.val)
    meta.step(inner.val, lower_closure=inner.objective)
    iterate(inner, meta)


def test_two_upper_steps_see_one_stock_loop() -> None:
    inner, meta, _ = stock(ridge_hpo())
    more: Any = UpperStep([inner.x], lower=inner)
    for each in (meta, more, meta):
        iterate(inner, each)
        assert each.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
    other, meta2, x2 = copy.deepcopy((inner, meta, inner.x))
    iterate(inner, meta)
    iterate(other, meta2)
    assert torch.equal(x2, inner.x) and torch.equal(other.y, inner.y)
