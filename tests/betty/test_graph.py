"""Graphs of problems where the analytic step is known: chains, several children, several parents, three levels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.hypergradient import CG, Neumann
from adaptive_bilevel_betty import SLS, SPSB, BiSLS, BiSPS, OneStepBiSLS, bind
from adaptive_bilevel_betty.graph import edges, lookahead
from tests.betty.problems import Level, Variable, engine, gradients_of_steps, only_new, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave")  # at the rounding floor of a minimum

EXACT = CG(max_iterations=50, tolerance=0.0)
DRAWS = torch.Generator().manual_seed(5)
A, B, C = (torch.randn(3, 3, generator=DRAWS, dtype=torch.float64) for _ in range(3))
H = A @ A.T + 0.5 * torch.eye(3, dtype=torch.float64)
T1, T2 = (torch.randn(3, generator=DRAWS, dtype=torch.float64) for _ in range(2))
X0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def half(residual: Tensor) -> Tensor:
    return 0.5 * residual.square().sum()


def weighted(residual: Tensor) -> Tensor:
    return 0.5 * residual @ H @ residual


def quiet(name: str, loss: Any, start: Tensor, **config: Any) -> Level:
    """A lower problem that stays where it is: at its solution."""
    return Level(name, loss, Variable(start), sgd(0.0), type="adaptive_cg", **config)


def upper(loss: Any, start: Tensor = X0, name: str = "top", **options: Any) -> Level:
    options = {"solver": EXACT, "reset": "initial", "curvature": math.inf, "carry": True, **options}
    return Level(name, loss, Variable(start), lambda p: BiSLS(p, 64.0, lower_bound=None, **options), retain_graph=True)


class Case:
    """A graph with all lower problems solved, and F(x) in closed form."""

    def __init__(self, levels: list[Level], F: Any, solutions: Any, **graph: Any) -> None:
        self.levels, self.F, self.solutions, self.graph = levels, F, solutions, graph


def two_children() -> Case:
    y, z = B @ X0, C @ X0
    low = [
        quiet("y", lambda p, b: weighted(p.module() - B @ p.top()), y),
        quiet("z", lambda p, b: half(p.module() - C @ p.top()), z),
    ]
    top = upper(lambda p, b: half(p.y() - T1) + half(p.z() - T2) + 0.1 * half(p.module()))
    return Case(
        [*low, top],
        lambda x: half(B @ x - T1) + half(C @ x - T2) + 0.1 * half(x),
        lambda x: [B @ x, C @ x],
        edges=[(low[0], top), (low[1], top)],
    )


def chain() -> Case:
    """The middle problem answers to the bottom one, and that to the top one."""
    bottom = quiet("bottom", lambda p, b: weighted(p.module() - B @ p.top()), B @ X0)
    middle = quiet("middle", lambda p, b: weighted(p.module() - C @ p.bottom()), C @ B @ X0)
    top = upper(lambda p, b: half(p.middle() - T1))
    return Case(
        [bottom, middle, top],
        lambda x: half(C @ B @ x - T1),
        lambda x: [B @ x, C @ B @ x],
        edges=[(bottom, middle), (middle, top)],
        ahead=[(top, bottom)],
    )


def diamond() -> Case:
    """As the chain, and the middle problem answers to the top one, too."""
    bottom = quiet("bottom", lambda p, b: weighted(p.module() - B @ p.top()), B @ X0)
    middle = quiet("middle", lambda p, b: half(p.module() - C @ p.bottom() - A @ p.top()), (C @ B + A) @ X0)
    top = upper(lambda p, b: half(p.middle() - T1) + 0.1 * half(p.module()))
    return Case(
        [bottom, middle, top],
        lambda x: half((C @ B + A) @ x - T1) + 0.1 * half(x),
        lambda x: [B @ x, (C @ B + A) @ x],
        edges=[(bottom, middle), (middle, top)],
        ahead=[(top, middle), (top, bottom)],
    )


K = 2.0


def nested() -> Case:
    """The middle problem looks ahead into the bottom one: its own minimizer takes that answer into account."""
    # b*(m) = B m; l(m) = |m - x|^2 / 2 + K |B m|^2 / 2, so m*(x) = M x.
    M = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + K * B.T @ B)
    bottom = quiet("bottom", lambda p, b: weighted(p.module() - B @ p.middle()), B @ M @ X0)
    middle = quiet("middle", lambda p, b: half(p.module() - p.top()) + K * half(p.bottom()), M @ X0, retain_graph=True)
    top = upper(lambda p, b: half(p.middle() - T1) + 0.1 * half(p.module()), carry=False)
    return Case(
        [bottom, middle, top],
        lambda x: half(M @ x - T1) + 0.1 * half(x),
        lambda x: [B @ M @ X0, M @ X0],
        edges=[(bottom, middle), (middle, top)],
    )


CASES = {case.__name__: case for case in (two_children, chain, diamond, nested)}


@pytest.mark.parametrize("name", CASES)
def test_the_analytic_step(name: str) -> None:
    """All is quadratic: phi(a) is F(x - a h), so the step, x and the carried solutions are known."""
    case = CASES[name]()
    made = bind(engine(*case.levels, steps=1, **case.graph), solver=EXACT)
    top = case.levels[-1]
    x = X0.clone().requires_grad_()
    value = case.F(x)
    (h,) = torch.autograd.grad(value, x)
    seen = gradients_of_steps(top)
    made.run()
    assert torch.allclose(seen[-1], h, rtol=1e-9), (seen[-1], h)
    record = top.optimizer.record
    assert record.slope == pytest.approx(float(h @ h), rel=1e-9)
    assert record.slope_ratio == pytest.approx(1.0, rel=1e-9)
    x = x.detach()
    step = next(a for r in range(60) if case.F(x - (a := 64.0 * 0.5**r) * h) <= value.detach() - 0.5 * a * h @ h)
    assert record.step_size == pytest.approx(step, rel=1e-12)
    assert torch.allclose(top.value, x - step * h, rtol=1e-9)
    assert record.value == pytest.approx(float(case.F(top.value)), rel=1e-9)
    for level, solution in zip(case.levels, case.solutions(top.value), strict=False):
        assert torch.allclose(level.value, solution, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_minimized_from_anywhere_with_no_number_given(name: str) -> None:
    case = CASES[name]()
    for level in case.levels[:-1]:
        upper_rule = name == "nested" and level.name == "middle"
        level._optimizer = (lambda p: BiSLS(p, solver=EXACT)) if upper_rule else SLS
        level._start = Variable(torch.zeros(3))
        level._unroll_steps = 10 if level is case.levels[0] or name == "two_children" else 1
    case.levels[-1]._optimizer = lambda p: BiSLS(p, solver=EXACT)
    bind(engine(*case.levels, steps=150, **case.graph)).run()
    x = torch.zeros(3, requires_grad=True)
    curvature = torch.func.hessian(case.F)(x.detach())
    (slope,) = torch.autograd.grad(case.F(x), x)
    best = float(case.F(-torch.linalg.solve(curvature, slope)))
    gap = (float(case.F(case.levels[-1].value)) - best) / (float(case.F(X0)) - best)
    assert gap < 0.1


def test_two_parents_of_one_child() -> None:
    low = quiet("y", lambda p, b: weighted(p.module() - B @ p.one() - C @ p.two()), B @ X0 + C @ T2)
    one = upper(lambda p, b: half(p.y() - T1), X0, "one")
    two = upper(lambda p, b: half(p.y() + T1) + half(p.module()), T2, "two")
    made = bind(engine(low, one, two, steps=1, edges=[(low, one), (low, two)]))
    made.run()
    x, z, y = X0.clone(), T2.clone(), B @ X0 + C @ T2
    for M, record, level, f in (
        (B, one.optimizer.record, one, lambda v, y: half(y - T1)),
        (C, two.optimizer.record, two, lambda v, y: half(y + T1) + half(v)),
    ):
        v = x if M is B else z
        w = v.clone().requires_grad_()
        (h,) = torch.autograd.grad(f(w, y + M @ (w - v)), w)
        assert record.slope == pytest.approx(float(h @ h), rel=1e-9)
        a = record.step_size
        assert a > 0
        assert torch.allclose(level.value, v - a * h, rtol=1e-9)
        y = y - a * M @ h
    assert torch.allclose(low.value, y, rtol=1e-9)


def test_two_parents_move_a_child_one_after_the_other() -> None:
    low = Level(
        "y", lambda p, b: weighted(p.module() - B @ p.one() - C @ p.two()), Variable(T1), SLS, type="adaptive_cg"
    )
    one = upper(lambda p, b: half(p.y() - T1), X0, "one", carry="auto")
    two = upper(lambda p, b: half(p.y() + T1) + half(p.module()), T2, "two", carry="auto")
    made = bind(engine(low, one, two, steps=1, edges=[(low, one), (low, two)]))
    start = []
    one.on_inner_loop_start = lambda: start.append(low.value.clone())
    made.run()
    expected = start[0]
    for parent in (one, two):
        assert parent.optimizer.record.moved
        moves = parent.optimizer.state["prediction"]
        expected = expected + moves["kept"] * moves["length"] * moves["moved"][0]
    assert torch.allclose(low.value, expected, rtol=1e-12)


def test_the_clock_of_a_polyak_rule_counts_one_parent() -> None:
    low = Level(
        "y", lambda p, b: half(p.module() - p.one() - p.two()), Variable(T1), SPSB, type="darts", unroll_steps=4
    )
    tops = [
        Level(name, lambda p, b: half(p.y() - T2), Variable(X0), BiSPS, retain_graph=True) for name in ("one", "two")
    ]
    made = bind(engine(low, *tops, steps=12, edges=[(low, tops[0]), (low, tops[1])]))
    assert low.optimizer.clock == 0
    made.run()
    assert low.optimizer.clock == 3


def test_the_order_of_problems_below() -> None:
    case = diamond()
    engine(*case.levels, steps=1, **case.graph)
    bottom, middle, top = case.levels
    assert lookahead(top) == [bottom, middle]
    assert edges(top) == {bottom: [top], middle: [top, bottom]} or edges(top) == {bottom: [top], middle: [bottom, top]}
    assert lookahead(bottom) == lookahead(middle) == []


def test_a_hypergradient_of_betty_that_does_not_descend_is_replaced() -> None:
    case = two_children()
    case.levels[-1]._optimizer = lambda p: BiSLS(p, solver=CG(3, 0.01))
    made = bind(engine(*case.levels, steps=1, **case.graph))
    top = case.levels[-1]
    before = float(case.F(X0))
    take = top.optimizer.step

    def negated() -> Any:
        top.module.value.grad.neg_()
        return take()

    top.optimizer.step = negated
    made.run()
    assert top.optimizer.record.moved
    assert top.optimizer.record.slope > 0
    assert top.optimizer.record.slope_ratio < 0
    assert float(case.F(top.value)) < before


def test_a_long_tangent_of_a_chain_is_not_believed() -> None:
    """The middle problem's gradient moves along the tangent, since its loss is not quadratic."""
    steps = []
    for curvature in (0.5, math.inf):
        zero = torch.zeros(1)
        bottom = quiet("bottom", lambda p, b: half(p.module() - p.top()), zero)
        middle = quiet("middle", lambda p, b: (p.module() - p.bottom()).cosh().sum() + half(p.module()), zero)
        top = upper(lambda p, b: (p.middle() - 50.0).square().sum(), zero, curvature=curvature)
        graph = {"edges": [(bottom, middle), (middle, top)], "ahead": [(top, bottom)]}
        bind(engine(bottom, middle, top, steps=1, **graph)).run()
        steps.append(top.optimizer.record.step_size)
    assert 0 < steps[0] < steps[1]


@only_new
@pytest.mark.parametrize("gas", [1, 2])
def test_roll_back(gas: int) -> None:
    """One lower step per upper one stays, and it starts from where the round began."""
    config = {"type": "adaptive_cg", "unroll_steps": 5, "gradient_accumulation": gas}
    low = Level("y", lambda p, b: weighted(p.module() - B @ p.top()), Variable(T1), SLS, **config)
    top = Level("top", lambda p, b: half(p.y() - T1) + 0.1 * half(p.module()), Variable(X0), BiSLS, retain_graph=True)
    made = bind(engine(low, top, steps=5 * gas, roll_back=True))
    made.run()
    assert top.optimizer.record.moved
    assert "warm_start" not in low.optimizer.state.get(low.module.value, {})
    residual = H @ (T1 - B @ top.value) / gas
    assert torch.allclose(low.value, T1 - low.optimizer.record.step_size * residual, rtol=1e-9)
    made.train_iters = 100 * gas
    made.run()
    assert float(half(low.value - T1)) < float(half(B @ X0 - T1))


def test_gradient_accumulation_sums_what_betty_sums() -> None:
    batches = [(torch.full((3,), float(i)),) for i in range(4)]
    low = Level(
        "y", lambda p, b: half(p.module() - b[0]), Variable(torch.zeros(3)), SLS, batches, gradient_accumulation=4
    )
    made = bind(engine(low, steps=4))
    made.run()
    record = low.optimizer.record
    assert low.optimizer.evaluations.lower.values == record.trials
    assert record.slope == pytest.approx(3 * 1.5**2)
    mean = sum(float(half(low.value - b[0])) for b in batches) / 4
    assert record.value == pytest.approx(mean)


@pytest.mark.parametrize("rule", [BiSLS, OneStepBiSLS])
def test_stock_optimizers_below(rule: Any) -> None:
    case = two_children()
    case.levels[0]._optimizer = sgd(0.1)
    case.levels[1]._optimizer = sgd(0.1, momentum=0.5)
    case.levels[-1]._optimizer = lambda p: rule(p, 0.1)
    for level in case.levels[:2]:
        level._unroll_steps = 30
    bind(engine(*case.levels, steps=600, **case.graph)).run()
    assert float(case.F(case.levels[-1].value)) < 0.5 * float(case.F(X0))


@pytest.mark.parametrize("solver", [EXACT, Neumann(200, 0.1)])
def test_the_response_takes_the_solver_of_its_optimizer(solver: Any) -> None:
    case = chain()
    case.levels[-1]._optimizer = lambda p: BiSLS(p, solver=solver)
    made = bind(engine(*case.levels, steps=1, **case.graph))
    made.run()
    assert case.levels[-1].optimizer.record.slope_ratio == pytest.approx(1.0, rel=1e-4)
