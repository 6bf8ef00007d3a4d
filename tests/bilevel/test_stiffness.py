"""Steps of x that make the lower loss steeper without end: penalties by entry, in logarithms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from adaptive_bilevel import AutoSLS, BiSLS, diagnose
from adaptive_bilevel.bilevel import stiffness
from adaptive_bilevel.hypergradient import CG, Implicit, Lanczos
from adaptive_bilevel.hypergradient.solution import HessianReport, SolverStatus
from adaptive_bilevel.optim.state import RoleState, read_states

ENTRIES = 20
NONE = stiffness.init()


class Penalties:
    """Logistic regression on features of scales 1 to .03, half of them noise; x has a logarithm of a penalty for each.

    g(x, y) = mean softplus(-b <a, y>) + sum exp(x) y^2 / 2, and f is the mean on other rows.
    """

    def __init__(self, solver: Any = None) -> None:
        generator = torch.Generator().manual_seed(1)
        scales = torch.logspace(0, -1.5, ENTRIES)
        rows = [torch.randn(300, ENTRIES, generator=generator) * scales for _ in range(2)]
        weights = torch.randn(ENTRIES, generator=generator) / scales
        weights[ENTRIES // 2 :] = 0.0
        noise = 0.3 * weights.norm() * scales.mean()
        labels = [torch.sign(a @ weights + noise * torch.randn(300, generator=generator)) for a in rows]
        self.train, self.validation = zip(rows, labels, strict=True)
        self.x = torch.full((ENTRIES,), -2.0, requires_grad=True)
        self.y = torch.zeros(ENTRIES, requires_grad=True)
        self.inner, solver = AutoSLS([self.y]), solver or Lanczos()
        self.outer = BiSLS([self.x], lower=self.inner, direction="adam", solver=solver, hypergradient=Implicit(solver))

    def g(self) -> Tensor:
        a, b = self.train
        return softplus(-b * (a @ self.y)).mean() + (self.x.exp() * self.y * self.y).sum() / 2

    def f(self, y: Tensor | None = None) -> Tensor:
        a, b = self.validation
        return softplus(-b * (a @ (self.y if y is None else y))).mean()

    def run(self, iterations: int) -> None:
        for _ in range(iterations):
            for _ in range(10):
                self.inner.step(self.g)
            self.outer.step(self.f)

    def solved(self) -> float:
        """F(x), by Newton's method from y."""
        (a, b), penalties = self.train, self.x.detach().exp()
        y = self.y.detach().clone()
        for _ in range(50):
            p = torch.sigmoid(-b * (a @ y))
            gradient = penalties * y - (a * (b * p)[:, None]).mean(0)
            hessian = (a * (p * (1 - p))[:, None]).T @ a / len(a) + torch.diag(penalties)
            y -= torch.linalg.solve(hessian, gradient)
        return float(self.f(y))


def test_penalties_stay_where_the_lower_loop_can_follow() -> None:
    problem = Penalties()
    problem.run(20)
    early = problem.solved()
    problem.run(160)
    assert problem.solved() < 1.1 * early  # 1.34 without the limit, and a curvature of 4e7
    assert float(problem.x.detach().exp().max()) < 1e3
    assert any("have made the lower loss steep" in text for text in diagnose(problem.outer))


def test_a_resumed_run_is_under_the_same_limit() -> None:
    problem = Penalties()
    problem.run(140)
    state = read(problem.outer)
    assert stiffness.limit(state) < math.inf
    resumed = Penalties()
    with torch.no_grad():
        resumed.x.copy_(problem.x)
        resumed.y.copy_(problem.y)
    for name in ("inner", "outer"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(problem, name).state_dict()))
    assert read(resumed.outer) == state
    problem.run(5)
    resumed.run(5)
    assert torch.equal(problem.x, resumed.x) and torch.equal(problem.y, resumed.y)


@pytest.mark.parametrize("solver", [CG(), Lanczos(ENTRIES)], ids=str)
def test_no_limit_where_all_curvatures_are_resolved_or_none_is_known(solver: Any) -> None:
    problem = Penalties(solver)
    problem.run(60)
    assert stiffness.limit(read(problem.outer)) == math.inf
    assert problem.outer.hessian is not None
    if isinstance(solver, Lanczos):
        assert problem.outer.hessian.horizon == math.inf
    else:
        assert read(problem.outer).shared == NONE.shared


def test_the_horizon_is_that_of_the_solver() -> None:
    problem = Penalties(Lanczos(5))
    problem.run(3)
    found = problem.outer.hessian
    assert found is not None
    assert found.horizon == pytest.approx(25.0 / found.norm)
    assert read(problem.outer).shared["least"] > 0.0


def report(norm: float, horizon: float) -> HessianReport:
    return HessianReport(SolverStatus.complete, 0.1, -norm, norm / 2, horizon=horizon)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([2.0], math.inf),
        ([2.0, 199.0], math.inf),
        ([2.0, 400.0], 0.5 * 3.0),
        ([400.0, 2.0, 300.0], 2.0 / 3.0 * 3.0),
        ([2.0, 400.0, 800.0], 2 * 0.25 * 3.0),  # the length is that before the first of them
        ([2.0, *[400.0] * 9], 9 * 0.5 * 3.0),  # steep once and for all: the limit fades
        ([2.0, 400.0, 100.0], math.inf),
        ([2.0, 400.0, 100.0, 800.0], 0.25 * 5.0),
        ([2.0, math.nan, 400.0], 0.5 * 3.0),
        ([2.0, 0.0, math.inf, 400.0], 0.5 * 3.0),
    ],
)
def test_the_limit_is_the_length_times_the_part_that_the_horizon_resolves(norms: list[float], expected: float) -> None:
    state, length = stiffness.init(), 3.0
    for norm in norms:
        held = stiffness.limit(state) < math.inf
        state = stiffness.seen(state, report(norm, 100.0 / norm if norm else math.inf), length)
        if held and stiffness.limit(state) == math.inf:
            length = 5.0  # steps have grown since
    assert stiffness.limit(state) == pytest.approx(expected)


@pytest.mark.parametrize("seen", [None, HessianReport(SolverStatus.converged, 0.0), report(400.0, math.nan)])
def test_a_solve_that_shows_no_curvature_changes_nothing(seen: HessianReport | None) -> None:
    known = stiffness.seen(stiffness.init(), report(2.0, 50.0), 1.0)
    assert stiffness.seen(known, seen, 1.0) == known


def test_an_exhausted_space_limits_nothing() -> None:
    state = stiffness.seen(stiffness.init(), report(2.0, 50.0), 1.0)
    assert stiffness.limit(stiffness.seen(state, report(1e6, math.inf), 1.0)) == math.inf


def read(outer: BiSLS) -> RoleState:
    return read_states(outer.state, {"stiffness": stiffness.init()}, outer.param_groups[0]["params"])["stiffness"]
