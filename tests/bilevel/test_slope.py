"""The searched function has the slope that the record says, whoever solves, and whatever the levels look like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import ClosureError
from adaptive_bilevel.hypergradient import CG, Identity, Neumann, implicit
from tests.bilevel.helpers import EXACT, Traced

SOLVERS: dict[str, Any] = {
    "exact": EXACT,
    "cg2": CG(max_iterations=2, tolerance=0.0),
    "cg.1": CG(),
    "neumann": Neumann(steps=5, scale=0.2),
    "neumann0": Neumann(steps=0, scale=0.2),
    "identity": Identity(0.3),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*slope is negative")


class Toy:
    """Two upper and three lower tensors of several shapes, one more of each frozen; nothing is quadratic."""

    def __init__(self, direct: bool = True, through_y: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).requires_grad_()

        self.upper = [leaf(2, 3), leaf(4)]
        self.lower = [leaf(3), leaf(), leaf(2, 2)]
        self.frozen = [leaf(2).requires_grad_(False), leaf(3).requires_grad_(False)]
        self.direct, self.through_y = direct, through_y

    def f(self) -> Tensor:
        (x, z), (a, b, c) = self.upper, self.lower
        total = torch.tensor(5.0)
        if self.through_y:
            total = total + (a - 1).square().sum() + (b * a).sum() + torch.cosh(c).sum() + b.square()
        if self.direct:
            total = total + 0.3 * x.square().sum() + (z[:2] * a[:2]).sum() * self.through_y + 0.1 * z.square().sum()
        return total

    def g1(self) -> Tensor:
        (x, _), (a, b, _) = self.upper, self.lower
        return 2 * (a - torch.tanh(x).sum(0)).square().sum() + torch.cosh(b) + 0.3 * (a[0] * b) + a.pow(4).sum() / 12

    def g2(self) -> Tensor:
        (x, z), (_, b, c) = self.upper, self.lower
        mixed = (c.flatten() - z).square().sum() + (self.frozen[1] * x[0]).sum() * b
        return mixed + 0.5 * b.square() + c.pow(4).sum() / 12

    def g(self) -> Tensor:
        return self.g1() + self.g2()


def slope(
    points: Sequence[Sequence[Tensor]], step: float, value: Callable[[], Tensor], tensors: Sequence[Tensor]
) -> float:
    """The slope of phi at 0, by central differences along the way to the trial that was taken at `step`."""
    start, end = points
    ways = [(q - p) / step for p, q in zip(start, end, strict=True)]
    present = [t.detach().clone() for t in tensors]
    values = []
    with torch.no_grad():
        for a in (1e-5, -1e-5):
            for t, p, w in zip(tensors, start, ways, strict=True):
                t.copy_(p + a * w)
            values.append(float(value()))
        for t, p in zip(tensors, present, strict=True):
            t.copy_(p)
    return (values[0] - values[1]) / 2e-5


def check(toy: Toy, outer: Any, lower_closure: Any = None) -> Any:
    tensors = [*toy.upper, *toy.lower]
    upper = Traced(toy.f, tensors)
    outer.policy = dataclasses.replace(outer.policy, reset="keep")  # no trial is longer than the first
    outer.step(upper, lower_closure)
    record = outer.record
    first = upper.points[1]  # the first trial
    step = record.proposed * 2.0 ** (record.trials - 1)
    assert -slope((upper.points[0], first), step, toy.f, tensors) == pytest.approx(record.slope, rel=1e-5, abs=1e-9)
    return record


def promise(toy: Toy, solver: Any) -> None:
    grads = implicit(toy.f, toy.g, toy.upper, toy.lower, solver=solver)
    for x, h in zip(toy.upper, grads, strict=True):
        x.grad = h


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_and_tensors(solver: str, direction: str) -> None:
    toy = Toy()
    inner = SLS([*toy.lower, toy.frozen[1]], 0.1, lower_bound=None)
    outer = BiSLS([*toy.upper, toy.frozen[0]], 0.1, lower=inner, solver=SOLVERS[solver], direction=direction)
    inner.step(toy.g)
    promise(toy, SOLVERS[solver])
    assert check(toy, outer).slope_ratio == pytest.approx(1.0, rel=0.5)


def test_with_a_linear_symmetric_solver_the_promise_is_kept() -> None:
    for solver in ("exact", "neumann", "neumann0"):
        toy = Toy()
        inner = SLS(toy.lower, 0.1, lower_bound=None)
        outer = BiSLS(toy.upper, 0.1, lower=inner, solver=SOLVERS[solver])
        inner.step(toy.g)
        promise(toy, SOLVERS[solver])
        assert check(toy, outer).slope_ratio == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("stock", [torch.optim.SGD, torch.optim.Adam])
def test_stock_lower_optimizers(stock: Any) -> None:
    toy = Toy()
    inner = stock([*toy.lower, toy.frozen[1]], lr=0.1)
    promise(toy, EXACT)
    check(toy, BiSLS(toy.upper, 0.1, lower=inner, solver=EXACT), toy.g)


@pytest.mark.parametrize("mixed", [False, True])
def test_several_lower_optimizers(mixed: bool) -> None:
    """The lower loss is the sum of theirs; a tensor may occur in two of them."""
    toy = Toy()
    first = SLS(toy.lower[:2], 0.1, lower_bound=None)
    second: Any = torch.optim.SGD(toy.lower[2:], lr=0.1) if mixed else SLS(toy.lower[2:], 0.1, lower_bound=None)
    first.step(toy.g1)
    if not mixed:
        second.step(toy.g2)
    promise(toy, EXACT)
    outer = BiSLS(toy.upper, 0.1, lower=[first, second], solver=EXACT)
    record = check(toy, outer, [None, toy.g2] if mixed else None)
    assert record.slope_ratio == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_groups_with_different_lr(direction: str) -> None:
    toy = Toy()
    inner = SLS(toy.lower, 0.1, lower_bound=None)
    groups = [{"params": [toy.upper[0]], "lr": 0.1}, {"params": [toy.upper[1]], "lr": 0.02}]
    outer: Any = BiSLS(groups, lower=inner, solver=EXACT, direction=direction)
    inner.step(toy.g)
    promise(toy, EXACT)
    before = [x.detach().clone() for x in toy.upper]
    record = check(toy, outer)
    assert record.slope_ratio == pytest.approx(1.0, rel=1e-9)
    steps = [group["step_size"] for group in outer.param_groups]
    assert steps[1] == pytest.approx(0.2 * steps[0])
    for x, old, step in zip(toy.upper, before, steps, strict=True):
        assert x.grad is not None
        along = x.grad
        if direction == "adam":  # half of the metric is the root mean square of the tensor at first
            along = 2 * x.grad / (x.grad.abs() + x.grad.square().mean().sqrt())
        assert torch.allclose(x, old - step * along, atol=1e-7)


def test_a_group_without_lr_stays() -> None:
    toy = Toy()
    inner = SLS(toy.lower, 0.1, lower_bound=None)
    groups = [{"params": [toy.upper[0]], "lr": 0.0}, {"params": [toy.upper[1]], "lr": 0.02}]
    outer: Any = BiSLS(groups, lower=inner, solver=EXACT)
    inner.step(toy.g)
    promise(toy, EXACT)
    before = toy.upper[0].detach().clone()
    assert check(toy, outer).moved
    assert torch.equal(toy.upper[0], before)


def test_an_upper_tensor_without_gradient_stays() -> None:
    toy = Toy()
    inner = SLS(toy.lower, 0.1, lower_bound=None)
    outer: Any = BiSLS(toy.upper, 0.1, lower=inner, solver=EXACT)
    inner.step(toy.g)
    promise(toy, EXACT)
    toy.upper[0].grad = None
    before = toy.upper[0].detach().clone()
    record = check(toy, outer)
    assert record.moved
    assert record.slope_ratio == pytest.approx(1.0, rel=1e-9)
    assert torch.equal(toy.upper[0], before)
    assert toy.upper[0].grad is None


@pytest.mark.parametrize(("direct", "through_y"), [(False, True), (True, False)])
def test_f_of_one_level_only(direct: bool, through_y: bool) -> None:
    toy = Toy(direct, through_y)
    inner = SLS(toy.lower, 0.1, lower_bound=None)
    outer: Any = BiSLS(toy.upper, 0.1, lower=inner, solver=EXACT)
    inner.step(toy.g)
    promise(toy, EXACT)
    record = check(toy, outer)
    assert record.moved
    assert record.slope_ratio == pytest.approx(1.0, rel=1e-9)


def test_without_a_lower_level() -> None:
    toy = Toy(through_y=False)
    for x in toy.upper:
        x.grad = torch.autograd.grad(toy.f(), x)[0]
    outer: Any = BiSLS(toy.upper, 0.1)
    record = check(toy, outer)
    assert record.slope == pytest.approx(sum(float(x.grad.square().sum()) for x in toy.upper if x.grad is not None))
    assert record.slope_ratio == pytest.approx(1.0)


def test_a_lower_level_that_upper_tensors_do_not_enter() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    inner = SLS([y], 0.1)
    inner.step(lambda: (y**2).sum())
    x.grad = 2 * x.detach()
    outer: Any = BiSLS([x], 0.1, lower=inner)
    before = y.detach().clone()
    outer.step(lambda: (x**2).sum() + (y**2).sum())
    assert outer.record.moved
    assert outer.record.slope == pytest.approx(8.0)
    assert torch.equal(y, before)


def test_all_lower_tensors_frozen() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(3)
    inner = torch.optim.SGD([y], lr=0.1)
    x.grad = 2 * x.detach()
    outer: Any = BiSLS([x], 0.1, lower=inner)
    with pytest.raises(ClosureError, match="depends on no tensor of lower"):
        outer.step(lambda: (x**2).sum() + (y**2).sum(), lambda: (x**2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_finite_in_short_types(dtype: torch.dtype) -> None:
    x, y = torch.full((3,), 2.0, dtype=dtype, requires_grad=True), torch.zeros(3, dtype=dtype, requires_grad=True)
    inner = SLS([y], 0.25)
    f, g = (lambda: (y - 1).square().sum() + 0.1 * x.square().sum()), (lambda: (y - x).square().sum())
    outer: Any = BiSLS([x], lower=inner)
    for _ in range(3):
        inner.step(g)
        x.grad = implicit(f, g, [x], [y])[0]
        outer.step(f)
        assert math.isfinite(outer.record.slope_ratio)
        assert x.dtype == dtype
    assert outer.record.moved
