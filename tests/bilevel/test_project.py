"""project=: feasible at every evaluation, sufficient decrease of the projected step, and the constrained optimum."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.optim.projection import Ball, Box, Simplex
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import BOX, EXACT, SEARCHES, SETS, STAYING, Traced
from tests.problems import Quadratic, random_qb_data, vector

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")


def optimum(data: Quadratic, kind: str) -> Tensor:
    """The constrained minimizer of F, by trying every set of active constraints."""
    H, n = data.ddF(), data.B.shape[0]
    g = data.problem("", torch.zeros(n), data.b).dF(torch.zeros(n))
    best, found = float("inf"), torch.zeros(n)
    choices = (None, *BOX) if kind != "simplex" else (None, 0.0)
    for fixed in itertools.product(choices, repeat=n):
        free = [i for i in range(n) if fixed[i] is None]
        x = vector([0.0 if v is None else v for v in fixed])
        if free:
            m = len(free)
            A, b = H[free][:, free], -(g + H @ x)[free]
            if kind == "simplex":
                A = torch.cat([torch.cat([A, torch.ones(m, 1)], 1), torch.tensor([[1.0] * m + [0.0]])])
                b = torch.cat([b, torch.tensor([1.5])])
            x[free] = torch.linalg.solve(A, b)[:m]
        inside = (x >= BOX[0] - 1e-12).all() and (x <= BOX[1] + 1e-12).all()
        if kind == "simplex":
            inside = (x >= -1e-12).all() and (x.sum() - 1.5).abs() < 1e-9
        value = float(0.5 * x @ H @ x + g @ x)
        if inside and value < best:
            best, found = value, x
    return found


def feasible(kind: str, x: Tensor) -> bool:
    if kind == "simplex":
        return bool((x >= 0).all() and (x.sum() - 1.5).abs() < 1e-12)
    return bool((x >= BOX[0]).all() and (x <= BOX[1]).all())


@pytest.mark.parametrize("start", ["inside", "corner"])
@pytest.mark.parametrize("lr", [1e3, None])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", SETS)
def test_feasible_and_decreasing(kind: str, search: str, lr: float | None, start: str) -> None:
    for seed in range(1):
        data, _, y0 = random_qb_data(seed)
        x0 = vector([0.5, 0.5, 0.5]) if kind == "simplex" else torch.zeros(3)
        if start == "corner":
            x0 = vector([1.5, 0.0, 0.0]) if kind == "simplex" else vector([-0.5, 0.25, 0.25])
        point = data.problem("", x0, y0).instance()
        inner = SLS([point.y], 1.0, lower_bound=None)
        outer: Any = SEARCHES[search]([point.x], lr, lower=inner, project=SETS[kind])
        moves = 0
        for _ in range(7):
            for _ in range(3):
                inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            x, h = point.x.detach().clone(), point.x.grad
            upper = Traced(point.upper, [point.x])
            before = float(outer.step(upper))
            assert all(feasible(kind, visited) for (visited,) in upper.points)
            assert feasible(kind, point.x.detach())
            record = outer.record
            if record.moved:
                moves += 1
                assert record.value <= before - 0.1 * record.step_size * record.slope + 1e-12
                # After many trials f is evaluated at x once more.
                displacement = x - next(p for (p,) in reversed(upper.points) if not torch.equal(p, x))
                assert h is not None
                if search != "step":
                    assert float(h @ displacement) == pytest.approx(record.step_size * record.slope, rel=1e-5, abs=1e-9)
        assert moves >= 1 or torch.allclose(x0, optimum(data, kind)) or search == "step"


@pytest.mark.parametrize(
    ("kind", "direction"),
    [(kind, direction) for kind in SETS for direction in ("sgd", "adam")],
)
def test_the_constrained_optimum(kind: str, direction: str) -> None:
    for seed in range(2):
        data, _, y0 = random_qb_data(seed, mu=1.0)
        x0 = vector([1.5, 0.0, 0.0]) if kind == "simplex" else vector([0.25, 0.25, 0.25])
        problem = data.problem("", x0, y0)
        point = problem.instance()
        inner = SLS([point.y], 1.0, lower_bound=None)
        betas = (0.0, 0.9)
        outer: Any = BiSLS(
            [point.x], lower=inner, project=SETS[kind], solver=EXACT, direction=direction, betas=betas, carry=True
        )
        inner.step(point.lower)
        for _ in range(40):
            with torch.no_grad():
                point.y.copy_(problem.ystar(point.x))
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            outer.step(point.upper, point.lower)
        expected = optimum(data, kind)
        assert torch.allclose(point.x.detach(), expected, atol=2e-3), (seed, point.x, expected, outer.record)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.filterwarnings("error")
def test_a_constrained_minimizer_is_a_zero_gradient(direction: str) -> None:
    """x - P(x - a d) is zero there but for rounding, of which nobody has to be warned."""
    x = vector([0.2, 0.3, 0.5]).requires_grad_()
    y = torch.zeros(3, requires_grad=True)
    cost = vector([3.0, 1.0, 2.0]) / 7.0
    inner = SLS([y])
    outer: Any = BiSLS([x], lower=inner, project=Simplex(), direction=direction, solver=EXACT)
    upper, lower = (lambda: cost @ y), (lambda: (y - x).square().sum() / 2)
    for _ in range(30):
        for _ in range(5):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y], EXACT))
        outer.step(upper)
    assert torch.allclose(x.detach(), vector([0.0, 1.0, 0.0]), atol=1e-15, rtol=0.0)
    assert outer.record.outcome is Outcome.zero_gradient


@pytest.mark.parametrize("lr", [1.0, None])
def test_momentum_stays_inside(lr: float | None) -> None:
    data, _, y0 = random_qb_data(3)
    point = data.problem("", torch.zeros(3), y0).instance()
    inner = SLS([point.y], 1.0, lower_bound=None)
    outer: Any = BiSLS([point.x], lr, lower=inner, project=Box(*BOX), direction="adam")
    moved = []
    for _ in range(20):
        inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y]))
        outer.step(point.upper)
        assert feasible("box", point.x.detach())
        moved.append(outer.record.moved)
    assert moved[0]
    assert moved[-1] or torch.allclose(point.x.detach(), optimum(data, "box"))


def test_at_the_constrained_optimum_nothing_moves() -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    inner = SLS([y], 0.1)
    inner.step(lambda: (y - x).square().sum())
    outer: Any = BiSLS([x], 1.0, lower=inner, project=Box(0.0, 1.0))
    x.grad = torch.ones(2)
    outer.step(lambda: (x + 1).square().sum() + y.square().sum())
    assert torch.equal(x, torch.zeros(2))
    assert outer.record.outcome.name == "zero_gradient"


def test_a_set_that_cuts_nothing_off_changes_no_rounding() -> None:
    ends = []
    for project in (None, Box(-100.0, 100.0)):
        data, x0, y0 = random_qb_data(3)
        point = data.problem("", x0, y0).instance()
        inner = SLS([point.y], 0.1, lower_bound=None)
        outer = BiSLS([point.x], 0.3, lower=inner, solver=EXACT, project=project)
        for _ in range(5):
            inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            outer.step(point.upper)
        ends.append(point.x.detach().clone())
    assert torch.equal(*ends)


def test_the_domain_of_the_loss_is_never_left() -> None:
    """f is not defined outside of the box: no trial may leave it by a rounding error."""
    x, y = torch.full((5,), 0.3, requires_grad=True), torch.zeros(1, requires_grad=True)
    inner = SLS([y], 0.1)
    inner.step(lambda: (y - x.sum()).square().sum())
    outer: Any = BiSLS([x], 3.7, lower=inner, project=Box(0.0, 1.0), max_trials=8)

    def upper() -> Tensor:
        assert float(x.detach().min()) >= 0.0
        return x.clamp(min=1e-300).sqrt().sum() + 0.01 * y.square().sum()

    for _ in range(6):
        x.grad = torch.linspace(0.1, 1.7, 5)
        outer.step(upper, lambda: (y - x.sum()).square().sum())
    assert float(x.detach().min()) == 0.0


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["box", "ball", "simplex"])
@pytest.mark.filterwarnings("error")
def test_a_start_outside_of_the_set(kind: str, search: str) -> None:
    x, y = vector([2.0, 5.0, 3.0]).requires_grad_(), torch.zeros(3, requires_grad=True)
    target = vector([0.9, 0.1, 0.4]) if kind != "box" else vector([0.2, 0.1, -0.4])
    inner = SLS([y])
    outer: Any = SEARCHES[search]([x], 1.0, lower=inner, project=STAYING[kind])
    upper, lower = (lambda: (y - 0.5 * target).square().sum()), (lambda: (y - x / 2).square().sum())
    for k in range(40):
        inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y], EXACT))
        visited = Traced(upper, [x])
        outer.step(visited)
        inside = x.detach().clone()
        STAYING[kind]([inside])
        assert torch.allclose(inside, x.detach(), rtol=0.0, atol=1e-15)
        assert not any(torch.equal(point, vector([2.0, 5.0, 3.0])) for (point,) in visited.points), k
    nearest = target.clone()
    STAYING[kind]([nearest])
    assert torch.allclose(x.detach(), nearest, atol=1e-3)


def test_a_start_outside_is_put_back_with_a_step_that_leaves_no_trace() -> None:
    x = vector([2.0, 5.0]).requires_grad_()
    outer: Any = BiSLS([x], 1.0, lower=None, project=Ball(1.0))
    x.grad = vector([1.0, 1.0])
    outer.step(lambda: x.sum() * float("nan"))
    assert outer.record.outcome is Outcome.non_finite
    assert torch.equal(x, vector([2.0, 5.0]))
