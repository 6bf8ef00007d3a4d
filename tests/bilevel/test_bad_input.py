"""Lower levels that no solver can invert: a status with a sentence, a result that moves nothing wrong, and no trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, Identity, Lanczos, LinearSolver, Neumann, SolverStatus, assign
from adaptive_bilevel.hypergradient.implicit import implicit_with_info
from tests.bilevel.helpers import everything

SOLVERS: dict[str, LinearSolver] = {
    "lanczos": Lanczos(),
    "lanczos, half": Lanczos(4, torch.bfloat16),
    "cg": CG(),
    "neumann": Neumann(10),
    "neumann, scaled": Neumann(10, 0.1),
    "neumann, random": Neumann(4, 0.1, random=True),
    "identity": Identity(0.1),
}
BLIND = ("identity",)  # it takes no product, so that it cannot see what is wrong with them


class _Passed(torch.autograd.Function):
    """The identity; what its derivative passes through is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Callable[[], float]) -> Tensor:
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor(), None


class _Spoiled(_Passed):
    """The identity; it is what its second derivative passes through that is multiplied."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Passed.apply(gradients[0], ctx.factor), None


def spoiled(tensor: Tensor, factor: Callable[[], float]) -> Tensor:
    found: Tensor = _Spoiled.apply(tensor, factor)
    return found


class Problem:
    """A quadratic problem with a module, whose buffer counts, and noise from torch's generator.

    Attributes:
        factor: Called in every product with H, which it multiplies.
    """

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        self.kind, self.factor = kind, lambda: 1.0
        size = 1 if kind == "one entry" else 6
        A = torch.randn(8, size).double()
        self.H = torch.zeros(size, size).double() if kind == "linear" else A.T @ A / 8 + 0.5 * torch.eye(size)
        self.C = torch.zeros(size, 3).double() if kind == "no push" else torch.randn(size, 3).double()
        self.x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        self.y = torch.ones(size, dtype=torch.float64, requires_grad=True)
        self.norm = nn.BatchNorm1d(2).double()

    def lower(self) -> Tensor:
        self.norm(torch.randn(4, 2).double())
        y = spoiled(self.y, self.factor)
        linear = self.y.sum() + self.x.sum() if self.kind == "linear" else 0.0
        return y @ self.H @ y / 2 - self.y @ self.C @ self.x + linear

    def upper(self) -> Tensor:
        part = self.x.square().sum() / 2
        return part if self.kind == "no f_y" else part + (self.y - 2).square().sum() / 2

    def tensors(self) -> dict[str, Any]:
        state = {n: t.clone() for n, t in self.norm.state_dict().items()}
        return {"x": self.x.detach().clone(), "y": self.y.detach().clone(), "random": torch.get_rng_state(), **state}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Case(NamedTuple):
    """What a kind of problem must lead to.

    Attributes:
        statuses: The statuses that solvers may report, Identity left out; None: any.
        direct: Whether h is its direct part f_x alone.
    """

    statuses: tuple[SolverStatus, ...] | None
    direct: bool


S = SolverStatus
CASES = {
    "no f_y": Case((S.zero_rhs,), True),
    "no push": Case(None, True),
    "one entry": Case((S.converged, S.complete), False),
    "k above y": Case((S.converged, S.complete), False),
    "linear": Case((S.flat,), True),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", CASES)
def test_degenerate_problems(kind: str, name: str) -> None:
    problem, solver, case = Problem(kind), SOLVERS[name], CASES[kind]
    inner = torch.optim.SGD([problem.y], lr=0.1)
    outer = BiSLS([problem.x], lower=inner, solver=solver, momentum=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        h, info = implicit_with_info(problem.upper, problem.lower, [problem.x], [problem.y], solver)
        status = info.solution.status
        assert status.sentence and h[0].isfinite().all()
        drawn = name == "neumann, random" and info.solution.iterations == 0
        if case.statuses is not None and (name not in BLIND or kind == "no f_y") and not drawn:
            assert status in case.statuses
            assert bool(said) == (kind == "linear")
        if case.direct and (kind != "linear" or (name not in BLIND and not drawn)):
            torch.testing.assert_close(h[0], info.direct[0])
        assign([problem.x], h)
        before, value = problem.y.detach().clone(), float(problem.upper().detach())
        outer.step(problem.upper, problem.lower)
    assert problem.x.isfinite().all() and problem.y.isfinite().all()
    assert outer.record is not None and outer.record.step_size > 0.0
    assert float(problem.upper().detach()) <= value + (1.0 if kind in ("one entry", "k above y") else 1e-12)
    if kind in ("no push", "linear") and name.startswith(("lanczos", "cg")):
        assert torch.equal(problem.y, before)
    assert outer.hessian is not None and outer.hessian.status.sentence


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in BLIND])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 2])
def test_products_that_are_not_finite(name: str, value: float, after: int) -> None:
    problem, calls = Problem("plain"), 0

    def factor() -> float:
        nonlocal calls
        calls += 1
        return value if calls > after else 1.0

    problem.factor = factor
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, info = implicit_with_info(problem.upper, problem.lower, [problem.x], [problem.y], SOLVERS[name])
    assert info.solution.tensors[0].isfinite().all()
    if info.solution.iterations > after:
        assert info.solution.status is SolverStatus.non_finite
        assert info.solution.iterations == after + 1
        assert len(said) == 1 and "not finite" in str(said[0].message)
    x, y = problem.x.detach().clone(), problem.y.detach().clone()
    outer = BiSLS([problem.x], lower=torch.optim.SGD([problem.y], lr=0.1), solver=SOLVERS[name])
    problem.x.grad = torch.ones_like(problem.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer.step(problem.upper, problem.lower)
    assert problem.x.isfinite().all() and problem.y.isfinite().all()
    assert outer.record is not None
    if outer.record.step_size == 0.0:
        assert torch.equal(problem.x, x) and torch.equal(problem.y, y)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in BLIND])
def test_products_that_change(name: str) -> None:
    problem = Problem("plain")
    numbers = iter([1.0, 3.0, 0.5, -2.0, 4.0] * 20)
    problem.factor = lambda: next(numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = problem.upper, problem.lower, [problem.x], [problem.y]
        _, info = implicit_with_info(*levels, SOLVERS[name], products="autograd")  # by differences, they are right
        assert info.solution.tensors[0].norm() <= 1e3
        if name.startswith("lanczos"):
            assert info.solution.status is SolverStatus.asymmetric
        outer = BiSLS([problem.x], lower=torch.optim.SGD([problem.y], lr=0.1), solver=SOLVERS[name])
        value = float(problem.upper().detach())
        problem.x.grad = problem.x.detach().clone()
        outer.step(problem.upper, problem.lower)
    assert problem.x.isfinite().all() and problem.y.isfinite().all()
    assert float(problem.upper().detach()) <= value + 1e-12


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in BLIND])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_solve_leaves_no_trace(name: str, at: int) -> None:
    problem, calls = Problem("plain"), 0
    inner = SLS([problem.y], 0.1, lower_bound=None)
    outer = BiSLS([problem.x], lower=inner, solver=SOLVERS[name])
    inner.step(problem.lower)
    problem.x.grad = torch.ones_like(problem.x)

    def factor() -> float:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return 1.0

    problem.factor = factor
    both = everything([problem.x, problem.y], inner, outer)
    for act in (
        lambda: implicit_with_info(problem.upper, problem.lower, [problem.x], [problem.y], SOLVERS[name]),
        lambda: outer.step(problem.upper),
    ):
        before, calls = problem.tensors(), 0
        try:
            act()
        except KeyboardInterrupt:
            assert same(problem.tensors(), before) and everything([problem.x, problem.y], inner, outer) == both
        else:
            assert "random" in name or calls < at
            return
