"""The check of the tangent: smooth curvature shortens steps, the kinks of ReLU networks do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive_bilevel import SLS, BiSLS, policies
from adaptive_bilevel.bilevel import Change
from adaptive_bilevel.bilevel.model_check import CurvatureCheck, NoCheck, TangentCheck, check_of
from adaptive_bilevel.bilevel.scale import Scale
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.hypergradient.cg import Adjoint
from adaptive_bilevel.policies import SearchState

PUSH = 2.0


class Measured:
    """A response whose lower gradients change as they are given, candidate after candidate."""

    path: Any = None
    slope: float = 1.0
    slope_ratio: float = 1.0
    comparable: bool = False
    offsets: Sequence[Tensor] | None = None

    def __init__(
        self, changes: Iterable[Change], correction: float | None = None, effects: Iterable[Change] = ()
    ) -> None:
        self._changes, self._correction, self._effects = iter(changes), correction, iter(effects)
        self.asked = 0

    def close(self) -> None: ...

    def answer(self, step: float) -> None: ...

    def changes(self) -> list[Change]:
        return [next(self._changes)]

    def confirm(self, place: Any) -> None: ...

    def effects(self) -> list[Change]:
        return [effect for effect in [next(self._effects, None)] if effect is not None]

    def correction(self) -> float | None:
        self.asked += 1
        return self._correction


def holds(check: TangentCheck, step: float, size: float, half: float, residual: float = 0.0) -> bool:
    """Check a step where the gradient changed by `size`, and by `half` at half of the step."""
    return check(step, 0.0, Measured(Change(s, PUSH, residual, 0.0) for s in (size, half)), lambda _: None)


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize(
    ("size", "half", "expected"),
    [
        (0.9, math.nan, True),  # below the limit of 1: the half step is not looked at
        (1.2, 0.3, False),  # of second order
        (1.2, 1.2, True),  # a jump
        (1.2, 1.3, True),  # a jump that another one makes up for
        (math.nan, 0.3, False),
        (math.inf, 0.3, False),
        (1.2, math.nan, False),
    ],
)
def test_what_holds(size: float, half: float, expected: bool, resumed: bool) -> None:
    assert holds(TangentCheck(0.5, resumed), 1.0, size, half) is expected


def test_what_the_solve_leaves_is_allowed() -> None:
    assert holds(TangentCheck(0.5, True), 1.0, 1.6, 0.4, residual=0.3)


def test_far_out_a_gradient_that_saturates_is_not_holds() -> None:
    """Change 10 however long the step, down to 1; quadratic below."""
    check, step, rejected = TangentCheck(0.5, False), 64.0, []

    def change(a: float) -> float:
        return 10.0 * min(a, 1.0) ** 2

    step = 4.0
    while not holds(check, step, change(step), change(step / 2)):
        rejected.append(step)
        step /= 2
    assert rejected == [4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    assert change(step) <= 0.5 * step * PUSH


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "along", "effects", "passes", "excused"),
    [
        ((0.9, 0.3), 0.9, [(0.9, 0.9)], True, False),
        ((5.0, 0.1), 1.5, [(0.9, 0.9)], True, True),  # a kink that y crosses after half of the step, y not solved
        ((9.0, 4.6), 1.5, [(0.9, 0.9)], True, True),  # kinks, more than the unsolved gradient allows for
        ((9.0, 4.4), 1.5, [(0.9, 0.9)], False, True),
        ((5.0, 2.6), 1.5, [(1.9, 1.9)], False, False),  # x saturates: no excuse
        ((5.0, 2.6), 1.5, [(2.5, 2.5), (1.2, 0.4)], False, False),  # the effect of x is of second order
        ((5.0, 2.6), 1.5, [(2.5, 2.5), (1.3, 0.7)], True, True),  # kinks that x crosses
        ((5.0, 2.6), 1.5, [(math.nan, math.nan), (1.3, 0.7)], False, False),
    ],
)
def test_x_must_have_the_effect_that_the_model_says(
    sizes: tuple[float, float],
    along: float,
    effects: list[tuple[float, float]],
    passes: bool,
    excused: bool,
    resumed: bool,
) -> None:
    """The effect of x alone is looked at where the part of the change along C^T d is not small."""
    changes = [Change(size, PUSH, 0.0, 0.0, before=10.0, along=along) for size in sizes]
    model = Measured(changes, effects=[Change(size, PUSH, 0.0, 0.0, along=part) for size, part in effects])
    check = TangentCheck(0.5, resumed, unsolved=0.5)
    check._inside = True
    assert (check(1.0, 0.0, model, lambda _: None), check.excused) == (passes, excused)


def test_searches_grow_by_the_root_after_an_excuse() -> None:
    policy, state = policies.SLS(grow=1.44), SearchState(previous=1.0)
    grows = [Scale(state, rejected=True, excused=excused).policy(policy).grow for excused in (False, True)]
    assert grows == [1.44, pytest.approx(1.2)]


@pytest.mark.parametrize(("residual", "expected"), [(0.5, False), (8.0, True)])
def test_kinks_below_a_poor_solve(residual: float, expected: bool) -> None:
    """Change sqrt(step), from a first trial so short that it exceeds all that the solve has left."""
    step = 1e-4
    change = lambda a: 20.0 * PUSH * math.sqrt(a / 1e-2) * 1e-2  # noqa: E731
    assert change(step) > (1.0 + residual) * step * PUSH
    assert holds(TangentCheck(0.5, False), step, change(step), change(step / 2), residual) is expected


def test_no_check() -> None:
    assert isinstance(check_of(math.inf), NoCheck) and isinstance(check_of(0.5), CurvatureCheck)
    assert NoCheck()(1.0, 0.0, Measured([]), lambda _: None)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_relu_network_as_lower_variable(direction: str) -> None:
    """Meta-learning of an initial point: the decreases that steps promise stay of the size of the losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    names = [name for name, _ in net.named_parameters()]
    meta = [p.detach().clone().requires_grad_() for p in net.parameters()]
    fast = [p.detach().clone().requires_grad_() for p in net.parameters()]
    weights, solver = torch.randn(10, 4), CG(max_iterations=5)
    inner: SLS = SLS(fast)
    outer: BiSLS = BiSLS(meta, lower=inner, direction=direction, solver=solver)

    def loss(data: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, dict(zip(names, fast, strict=True)), (data,)), labels)

    def lower(data: Tensor, labels: Tensor) -> Tensor:
        distance = sum(((a - b) ** 2).sum() for a, b in zip(fast, meta, strict=True))
        return loss(data, labels) + 0.25 * distance

    steps = []
    for _ in range(25):
        order = torch.randperm(4)
        train, test = torch.randn(2, 40, 10)
        labels, targets = ((data @ weights[:, order]).argmax(1) for data in (train, test))
        with torch.no_grad():
            torch._foreach_copy_(fast, meta)
        for _ in range(5):
            inner.step(partial(lower, train, labels))
        upper, last = partial(loss, test, targets), partial(lower, train, labels)
        assign(meta, implicit(upper, last, meta, fast, solver=solver))
        outer.step(upper)
        assert outer.record is not None
        steps.append(outer.record.step_size * outer.record.slope)
    assert sorted(steps)[len(steps) // 2] > 1e-2  # 1e-4 and below where kinks shorten them


def test_adjoint_is_the_same_inverse_as_that_of_the_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator)
    hessian = root @ root.mT + 0.1 * torch.eye(8)
    push, functional = torch.randn(2, 8, generator=generator)
    for iterations in (1, 3, 8):
        adjoint = Adjoint([functional])
        solver = CG(max_iterations=iterations, tolerance=0.0)
        (w,) = solver.solve(lambda v: [hessian @ v[0]], [push], adjoint=adjoint).tensors
        torch.testing.assert_close(adjoint.tensors[0] @ push, functional @ w)
        torch.testing.assert_close(adjoint.tensors[0] @ (push - hessian @ w), torch.tensor(0.0), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(adjoint.tensors[0], torch.linalg.solve(hessian, functional), rtol=1e-6, atol=1e-8)


def test_adjoint_corrects_the_searched_function_to_the_next_order() -> None:
    # y*(x) = sin(x) + x^2: the tangent is off by a second-order term, the corrected value by a fourth-order one
    x, y = torch.tensor([0.3]), torch.tensor([math.sin(0.3) + 0.09])

    def lower_gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2.0 * (y - x.sin() - x**2)

    target = torch.tensor([1.0])
    adjoint = Adjoint([y - target])
    w = -(x.cos() + 2.0 * x)  # of a move by -a
    adjoint.observe([w], [2.0 * w])
    adjoint.take([w])
    errors = []
    for step in (0.02, 0.01):
        there = y + step * w
        exact = float(((x - step).sin() + (x - step) ** 2 - target).square() / 2)
        searched = float((there - target).square() / 2)
        delta = lower_gradient(x - step, there) - lower_gradient(x, y)
        errors.append((abs(searched - exact), abs(searched - float(adjoint.tensors[0] @ delta) - exact)))
        correction = adjoint.correction([lower_gradient(x - step, there)], [lower_gradient(x, y)])
        assert correction == pytest.approx(-float(adjoint.tensors[0] @ delta))
    (plain, corrected), (plain_half, corrected_half) = errors
    assert 3.0 < plain / plain_half < 5.0
    assert corrected / corrected_half > 6.0
    assert corrected < 0.1 * plain


def test_direction_of_negative_curvature_is_left_out() -> None:
    adjoint = Adjoint([torch.ones(2)])
    assert adjoint.observe([torch.ones(2)], [-torch.ones(2)]) == (-2.0, 2.0)
    adjoint.take([torch.ones(2)])
    assert not adjoint.tensors[0].any()


@pytest.mark.parametrize("resumed", [False, True])
def test_change_that_does_no_harm_to_f_is_excused_but_for_a_first_search(resumed: bool) -> None:
    asked: list[bool] = []
    places: list[float] = []
    for size, answer, expected in ((0.9, False, True), (1.9, True, True), (1.9, False, False)):
        changes = [Change(size, PUSH, 0.0, 0.0), Change(0.25 * size, PUSH, 0.0, 0.0)]
        model = Measured(changes, correction=1.0 if answer else 3.0)
        passed = TangentCheck(0.5, resumed)(1.0, 2.0, model, places.append)
        asked += [answer] * model.asked
        assert passed is (expected and (resumed or size < 1.0))
    assert asked == ([True, False] if resumed else [])
    assert places == ([0.5] if resumed else [0.5, 0.5])


@pytest.mark.parametrize(("size", "residual", "expected"), [(1.9, 0.0, True), (2.1, 0.0, False), (2.1, 0.1, True)])
def test_change_as_large_as_without_an_answer_is_never_excused(size: float, residual: float, expected: bool) -> None:
    model = Measured([Change(size, PUSH, residual, 0.0), Change(0.25 * size, PUSH, residual, 0.0)], correction=0.0)
    assert TangentCheck(0.5, True)(1.0, 1.0, model, lambda _: None) is expected


def test_a_rejection_in_a_first_search_makes_nothing_excused() -> None:
    check = TangentCheck(0.5, False)
    for step in (1.0, 0.5, 0.25):
        model = Measured([Change(3.0 * step, PUSH, 0.0, 0.0), Change(0.75 * step, PUSH, 0.0, 0.0)], correction=0.0)
        assert not check(step, 1.0, model, lambda _: None)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("sizes", [(math.inf, 1.0), (math.nan, 1.0), (10.0, math.inf)])
def test_a_change_that_is_not_finite_is_never_holds(sizes: tuple[float, float], resumed: bool) -> None:
    """Its rounding is not finite either, so it is no larger than that."""
    model = Measured(Change(size, 1.0, 0.0, math.inf if size == math.inf else 0.0) for size in sizes)
    assert not TangentCheck(0.5, resumed=resumed)(1.0, 0.0, model, lambda _: None)


def test_a_lower_gradient_that_overflows_is_not_entered() -> None:
    """Penalties exp(10 x) y^2 and f(y) alone: no value of f tells that the lower gradient has left the dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 256, 400, generator=generator, dtype=torch.float32) / 20.0).unbind()
    labels = torch.randint(10, (2, 256), generator=generator)
    x = torch.full((400, 10), -0.5, dtype=torch.float32, requires_grad=True)
    y = torch.zeros(400, 10, dtype=torch.float32, requires_grad=True)
    fit = lambda part: nn.functional.cross_entropy(inputs[part] @ y, labels[part])  # noqa: E731
    lower = lambda: fit(1) + ((10 * x).exp() * y**2).sum()  # noqa: E731
    inner = SLS([y])
    outer: Any = BiSLS([x], lower=inner, solver=CG(max_iterations=10, tolerance=0.0))
    for _ in range(3):
        for _ in range(5):
            inner.step(lower)
        assign([x], implicit(lambda: fit(0), lower, [x], [y], outer.solver))
        outer.step(lambda: fit(0))
        assert float(lower().detach()) < 10.0
