"""Modules whose hypergradient TorchOpt computes wrongly without saying so: refused with the cause and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.errors import (
    ClosureError,
    HypergradientError,
    OptionError,
    SolverError,
    TensorError,
)
from adaptive_bilevel_torchopt import FunctionalLowerStep, LowerStep, UpperStep
from tests.problems import b2, ridge_hpo
from tests.torchopt.modules import EXACT_CG, SOLVE, Base, implicit_module, iterate, leaf, pair, snapshot


def test_a_subclass_that_has_lost_its_linear_solve_is_refused() -> None:
    class Derived(implicit_module(EXACT_CG)):  # type: ignore[misc]
        def solve(self) -> None: ...

    x = leaf(ridge_hpo())
    with pytest.raises(OptionError, match=r"does not inherit linear_solve.*hold a module instead"):
        Derived(x, ridge_hpo()).automatic()
    with pytest.raises(OptionError, match="does not inherit"):
        UpperStep([x], lower=Derived(x, ridge_hpo()))


def test_the_block_diagonal_dense_solver_is_refused() -> None:
    class Two(Base, linear_solve=SOLVE.solve_inv()):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.x = x
            self.weight, self.bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
            self.lower = LowerStep(self)

        def objective(self) -> Tensor:
            return (self.weight.sum() + self.bias - 1).square().sum() + (self.x * self.weight.square()).sum()

        def solve(self) -> None:
            self.lower.attach()(self.objective)

    x = torch.ones(3, requires_grad=True)
    inner = Two(x)
    meta: Any = UpperStep([x], lower=inner.lower)
    inner.solve()
    with pytest.raises(SolverError, match=r"diagonal blocks.*solve_cg\(\)"):
        meta.step(lambda: inner.weight.square().sum())


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_a_neumann_series_that_diverges_is_refused(upper: Any) -> None:
    problem = b2()  # ||H|| = 4.02
    inner, meta, x = pair(problem, linear_solve=SOLVE.solve_inv(ns=True, maxiter=50), rule=upper)
    inner.solve()
    at = x.detach().clone()
    with pytest.raises(SolverError, match=r"norm 4\.0.*alpha below 0\.49"):
        meta.step(inner.val)
    assert torch.equal(x, at) and x.grad is None
    inner, meta, x = pair(problem, linear_solve=SOLVE.solve_inv(ns=True, maxiter=50, alpha=0.4), rule=upper)
    iterate(inner, meta)
    assert not torch.equal(x, problem.x0)


def test_lower_parameters_without_a_dimension_are_refused() -> None:
    class Scalar(implicit_module(EXACT_CG)):  # type: ignore[misc]
        def __init__(self, x: Tensor) -> None:
            super().__init__(x, b2())
            self.y = nn.Parameter(torch.zeros(()))

        def solve(self) -> None:
            self.lower.attach()

    Scalar.linear_solve = EXACT_CG
    with pytest.raises(TensorError, match=r"torchopt#222.*shape \(1,\)"):
        Scalar(leaf(b2())).automatic().solve()
    lower = FunctionalLowerStep(lambda y: y.square())
    with pytest.raises(TensorError, match="#222"):
        lower.attach(torch.zeros(()))


@pytest.mark.parametrize("when", ["before", "after an upper step", "after a reset"])
def test_a_lower_parameter_that_is_frozen_is_refused(when: str) -> None:
    inner, meta, x = pair(ridge_hpo())
    if when != "before":
        iterate(inner, meta)
        for grad in (torch.no_grad(), torch.enable_grad()):  # solutions without a graph are no choice of the user's
            with grad:
                inner.solve()
        x.requires_grad_(False)
        inner.solve()
        x.requires_grad_()
        iterate(inner, meta)
    if when == "after a reset":
        inner.lower.reset([torch.zeros(5)])
    at = snapshot(inner.y.requires_grad_(False), inner.lower.state_dict())
    with pytest.raises(TensorError, match=r"lower parameter 0 .* is frozen.*buffer"):
        inner.solve()
    assert snapshot(inner.y, inner.lower.state_dict()) == at and not inner.y.requires_grad
    inner.y.requires_grad_()
    iterate(inner, meta)


def test_an_objective_with_a_dimension_is_refused() -> None:
    inner, _, _ = pair(ridge_hpo())
    step = inner.lower.attach()
    with pytest.raises(ClosureError, match=r"shape \(1,\).*scalars without a dimension"):
        step(lambda: inner.objective().reshape(1))


def test_upper_parameters_that_torchopt_does_not_know_are_refused() -> None:
    problem = b2()
    x = leaf(problem)

    class Hidden(Base, linear_solve=EXACT_CG):
        def __init__(self, known: Tensor) -> None:
            super().__init__()
            self.known = known
            self.y = nn.Parameter(problem.y0.clone())
            self.lower = LowerStep(self, lr=0.1, lower_bound=None)

        def objective(self) -> Tensor:
            return problem.g(x, self.y) + self.known.square().sum() * self.y.square().sum()

        def solve(self) -> None:
            self.lower.attach()(self.objective)

    known = torch.ones(1, requires_grad=True)
    inner = Hidden(known)
    meta: Any = UpperStep([known, x], lower=inner.lower)
    inner.solve()
    with pytest.raises(HypergradientError, match="constructor of the implicit module"):
        meta.step(lambda: problem.f(x, inner.y))
    direct = torch.ones(1, requires_grad=True)  # an upper parameter that only f depends on is fine
    meta = UpperStep([known, direct], lower=inner.lower)
    inner.solve()
    meta.step(lambda: problem.f(x.detach(), inner.y) + direct.square().sum())
