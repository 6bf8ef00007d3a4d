"""Where y is after an upper step: moved along, by a share of it, or where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
    certified = upper.points[-1]
    assert torch.equal(point.x, certified[0])
    assert torch.equal(point.y, certified[1] if carry else y0)
    assert not torch.equal(certified[1], y0)


def test_a_step_that_does_not_move_carries_nothing() -> None:
    for carry in (True, "auto"):
        point, inner, outer = prepared(carry)
        inner.step(point.lower)
        y0 = point.y.detach().clone()
        point.x.grad = torch.zeros_like(point.x)
        outer.step(point.upper)
        assert outer.record.outcome == Outcome.zero_gradient
        assert torch.equal(point.y, y0)


def test_a_zero_hypergradient_touches_no_state() -> None:
    point, inner, outer = prepared(direction="adam")
    iterate(inner, outer, point)
    point.x.grad = torch.zeros_like(point.x)
    before = everything([point.x, point.y], inner, outer)
    outer.step(point.upper)
    assert everything([point.x, point.y], inner, outer) == before


def test_a_middle_level_is_moved_along_too() -> None:
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
    assert not torch.equal(z, torch.zeros(1))
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


def test_a_mixed_list_is_moved_as_one() -> None:
    x, a, b = (torch.tensor([v], requires_grad=True) for v in (4.0, 0.0, 0.0))
    first, second = SLS([a], 0.1), torch.optim.SGD([b], lr=0.1)
    outer = BiSLS([x], 1.0, lower=[first, second])
    first.step(lambda: (a - x).square().sum())
    x.grad = torch.ones(1)
    before = a.detach().clone()
    outer.step(lambda: (a**2 + b**2 + x**2).sum(), [None, lambda: (b - x).square().sum()])
    moves = [(p.detach() - q).item() for p, q in ((a, before), (b, torch.zeros(1)))]
    assert moves[0] == pytest.approx(moves[1])
    assert moves[0] != 0.0
