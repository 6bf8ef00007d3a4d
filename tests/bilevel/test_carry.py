"""Where y is after an upper step: carried to the prediction or offered as a start, or where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SPSB, BiSLS
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import EXACT, Traced, everything, iterate, prepared

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")


@pytest.mark.parametrize("carry", [True, False, "auto"])
@pytest.mark.parametrize("kind", [SLS, SPSB, torch.optim.SGD, torch.optim.Adam])
def test_where_y_is_after_a_step(carry: Any, kind: Any) -> None:
    point, inner, outer = prepared(carry, kind)
    own = kind in (SLS, SPSB)
    if own:
        inner.step(point.lower, **({"lower_bound": -100.0} if kind is SPSB else {}))
    point.x.grad = torch.ones_like(point.x)
    y0 = point.y.detach().clone()
    upper = Traced(point.upper, [point.x, point.y])
    outer.step(upper, None if own else point.lower)
    assert outer.record.moved
    carried = carry is True or (carry == "auto" and own)
    certified = upper.points[-1]
    assert torch.equal(point.x, certified[0])
    if carry is True:
        assert torch.equal(point.y, certified[1])
    elif carried:
        assert torch.allclose(point.y, certified[1], rtol=1e-14, atol=0)
        assert torch.equal(inner.state[point.y]["warm_start"]["point"], y0)
    else:
        assert torch.equal(point.y, y0)
    assert not torch.equal(certified[1], y0)
    assert own is False or carry == "auto" or "warm_start" not in inner.state[point.y]


@pytest.mark.parametrize(("share", "kept"), [(1.0, 1.0), (1.5, 1.0), (0.25, 0.25), (0.0, 0.0), (-0.5, 0.0)])
def test_the_next_lower_step_keeps_the_share_that_is_best(share: float, kept: float) -> None:
    """The minimizer of its loss is at this share of the prediction."""
    point, inner, outer = prepared()
    inner.step(point.lower)
    y0 = point.y.detach().clone()
    point.x.grad = torch.ones_like(point.x)
    outer.step(point.upper)
    predicted = point.y.detach().clone()
    target = y0 + share * (predicted - y0)
    lower = Traced(lambda: (point.y - target).square().sum() + 1.0, [point.y])
    inner.step(lower)
    assert torch.equal(lower.points[0][0], predicted)
    assert torch.equal(lower.points[1][0], y0)
    base = [p[0] for p, graph in zip(lower.points, lower.graphs, strict=True) if graph][-1]
    assert torch.allclose(base, y0 + kept * (predicted - y0), rtol=1e-12, atol=1e-12)
    assert sum(lower.graphs) == (2 if kept > 0.0 else 1)
    assert "warm_start" not in inner.state[point.y]
    calls = Traced(point.lower)
    inner.step(calls)
    assert calls.calls == 1 + inner.record.trials


def cold_in_place(y: Tensor) -> None:
    with torch.no_grad():
        y.zero_()


def cold_by_data(y: Tensor) -> None:
    y.data.zero_()


def cold_by_new_data(y: Tensor) -> None:
    y.data = torch.zeros_like(y)


@pytest.mark.parametrize(
    "restart",
    [cold_in_place, cold_by_data, cold_by_new_data],
)
def test_a_cold_start_voids_the_offer(restart: Any) -> None:
    point, inner, outer = prepared()
    inner.step(point.lower)
    point.x.grad = torch.ones_like(point.x)
    outer.step(point.upper)
    restart(point.y)
    lower = Traced(point.lower, [point.y])
    inner.step(lower)
    assert torch.equal(lower.points[0][0], torch.zeros_like(point.y))
    assert lower.calls == 1 + inner.record.trials


def test_a_step_that_does_not_move_carries_nothing() -> None:
    for carry in (True, "auto"):
        point, inner, outer = prepared(carry)
        inner.step(point.lower)
        y0 = point.y.detach().clone()
        point.x.grad = torch.zeros_like(point.x)
        outer.step(point.upper)
        assert outer.record.outcome == Outcome.zero_gradient
        assert torch.equal(point.y, y0)
        assert "warm_start" not in inner.state[point.y]


def test_a_zero_hypergradient_touches_no_state() -> None:
    point, inner, outer = prepared(direction="adam")
    iterate(inner, outer, point)
    point.x.grad = torch.zeros_like(point.x)
    before = everything([point.x, point.y], inner, outer)
    outer.step(point.upper)
    assert everything([point.x, point.y], inner, outer) == before


def test_a_middle_level_is_not_moved_without_a_way_back() -> None:
    point, inner, _ = prepared()
    z = torch.zeros(1, requires_grad=True)
    middle = BiSLS([z], 1.0, lower=inner, solver=EXACT)
    x = torch.ones(1, requires_grad=True)
    outer = BiSLS([x], 1.0, lower=[middle, inner], solver=EXACT)
    inner.step(point.lower)
    x.grad = torch.ones(1)
    y0 = point.y.detach().clone()
    outer.step(
        lambda: (x - 3).square().sum() + z.square().sum() + point.y.sum(),
        [lambda: (z - x).square().sum(), lambda: (point.y - x).square().sum()],
    )
    assert outer.record is not None and outer.record.moved
    assert torch.equal(z, torch.zeros(1))
    assert not torch.equal(point.y, y0)


def test_lower_losses_may_share_a_module_with_buffers() -> None:
    """A replay puts buffers back that the graph of another lower loss holds."""
    norm, x = nn.BatchNorm1d(2), torch.ones(2, requires_grad=True)
    ys = [nn.Parameter(torch.full((2,), v)) for v in (0.5, 1.0)]
    inputs = torch.randn(8, 2)
    inners = [SLS([y]) for y in ys]
    closures = [lambda y=y: (norm(inputs * x) * y - 1.0).square().mean() for y in ys]
    for inner, closure in zip(inners, closures, strict=True):
        inner.step(closure)
    outer = BiSLS([x], lower=inners, solver=EXACT)
    x.grad = torch.tensor([1.0, 0.5])
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    outer.step(lambda: sum((y * x - 3.0).square().sum() for y in ys))
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


def test_a_mixed_list_carries_what_can_go_back() -> None:
    x, a, b = (torch.tensor([v], requires_grad=True) for v in (4.0, 0.0, 0.0))
    first, second = SLS([a], 0.1), torch.optim.SGD([b], lr=0.1)
    outer = BiSLS([x], 1.0, lower=[first, second])
    first.step(lambda: (a - x).square().sum())
    x.grad = torch.ones(1)
    before = a.detach().clone()
    outer.step(lambda: (a**2 + b**2 + x**2).sum(), [None, lambda: (b - x).square().sum()])
    assert torch.equal(b, torch.zeros(1))
    assert not torch.equal(a, before)
    assert torch.equal(first.state[a]["warm_start"]["point"], before)
