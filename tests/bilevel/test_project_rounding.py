"""project= and rounding: large entries, many entries, short dtypes, and first trials beyond a dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import BiSLS
from adaptive_bilevel.optim.projection import Ball, Box
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import STAYING

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")

LARGE: dict[str, Any] = {
    "box": Box(0.0, float("inf")),
    "callable": lambda tensors: [t.clamp_(min=0.0) for t in tensors],
}


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_large_entry_does_not_hide_the_others(kind: str, direction: str) -> None:
    x = torch.tensor([1e8, 1.0], dtype=torch.float32, requires_grad=True)
    outer: Any = BiSLS([x], lower=None, project=LARGE[kind], direction=direction)
    for _ in range(20):
        x.grad = None
        loss = lambda: (x[0] / 1e8 - 1).square() + (x[1] + 1).square()  # noqa: E731
        loss().backward()
        outer.step(loss)
    assert 0.0 <= float(x[1].detach()) < 1e-6


@pytest.mark.parametrize("lower_bound", [0.0, None])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["ball", "callable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("error")
def test_what_rounding_leaves_of_a_move_is_a_zero_gradient(
    dtype: torch.dtype, kind: str, direction: str, lower_bound: float | None
) -> None:
    """At the solution on a ball <h, x - P(x - a h)> is rounding of x, of either sign; here f is 0 there."""
    for seed in range(4):
        target = 3 * torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x = torch.zeros(20, dtype=dtype, requires_grad=True)
        project: Any = Ball(1.0) if kind == "ball" else lambda tensors: Ball(1.0)(tensors)
        lr = None if lower_bound == 0.0 else 1.0
        outer: Any = BiSLS([x], lr, lower=None, project=project, direction=direction, lower_bound=lower_bound)
        for _ in range(12):
            loss = lambda: target.norm() - (target * x).sum()  # noqa: E731
            x.grad = torch.autograd.grad(loss(), x)[0]
            outer.step(loss)
        assert outer.record.outcome is Outcome.zero_gradient, seed
        assert torch.allclose(x.detach(), target / target.norm(), atol=4 * torch.finfo(dtype).eps, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [None, *STAYING])
def test_first_trials_beyond_the_dtype(kind: str | None, dtype: torch.dtype) -> None:
    x = torch.tensor([0.25, 0.1], dtype=dtype, requires_grad=True)
    project, target = STAYING.get(str(kind)), torch.tensor([1.0, 2.0], dtype=dtype)
    most = 1e4 * float(torch.finfo(dtype).max) if dtype is not torch.float64 else 1e300
    outer: Any = BiSLS([x], most, lower=None, project=project, lower_bound=None, max_trials=2000)
    loss = lambda: (x - target).float().square().sum()  # noqa: E731
    for _ in range(40):
        x.grad = torch.autograd.grad(loss(), x)[0]
        outer.step(loss)
    expected = {"None": [1.0, 2.0], "box": [0.25, 0.25], "callable": [0.25, 0.25], "simplex": [0.0, 1.0]}
    goal = torch.tensor(expected.get(str(kind), [0.2**0.5, 0.8**0.5]), dtype=dtype)
    assert torch.allclose(x.detach(), goal, atol=max(2e-3, 2.0 * torch.finfo(dtype).eps ** 0.5))


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["box", "callable"])
def test_many_entries_of_a_short_dtype_move(kind: str, direction: str) -> None:
    """A sum of |h x| over them leaves float16, and is no sign that all of a move is rounding."""
    x = torch.full((20000,), 0.25, dtype=torch.float16)
    x[:10000] = -0.25
    x.requires_grad_()
    outer: Any = BiSLS([x], 1.0, lower=None, project=STAYING[kind], direction=direction)
    x.grad = torch.full_like(x.detach(), 20.0)
    outer.step(lambda: 20.0 * (x.float() + 1.0).sum())
    assert outer.record.moved


@pytest.mark.filterwarnings("error")
def test_a_projection_that_only_rounds_leaves_adams_direction() -> None:
    """As U diag(s) V of a singular value decomposition: it returns every point of the set changed by rounding."""
    ends = []
    for project in (None, lambda tensors: [t.mul_(3.0).div_(3.0) for t in tensors]):
        x = torch.tensor([1.0, -0.7, 0.3], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
        outer: Any = BiSLS([x], direction="adam", hypergradient="direct", project=project)
        for _ in range(15):
            outer.step(lambda x=x, scale=scale: (scale * (x - 0.1).square()).sum() + (x.sum() - 1.0).square())
        ends.append(x.detach().clone())
    assert torch.allclose(ends[0], ends[1], rtol=1e-6, atol=0.0)
