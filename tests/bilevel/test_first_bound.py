"""The first bound of BiSPS, where no number is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SPSB, BiSPS
from adaptive_bilevel.hypergradient import assign, implicit

Loss = Callable[[], Tensor]


def penalties(answer: Callable[[Tensor], Tensor], start: float) -> tuple[Tensor, Tensor, Loss, Loss]:
    """g = |A y - t|^2 / n + <answer(x), y^2>, with f on other rows."""
    generator = torch.Generator().manual_seed(3)
    A, V = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (14, 30))
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    t, s = (M @ w + 2.0 * torch.randn(len(M), generator=generator, dtype=torch.float64) for M in (A, V))
    x = torch.full((12,), start, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(12, dtype=torch.float64, requires_grad=True)

    def lower() -> Tensor:
        return ((A @ y - t) ** 2).mean() + (answer(x) * y**2).sum()

    return x, y, lower, lambda: ((V @ y - s) ** 2).mean()


def run(x: Tensor, y: Tensor, lower: Loss, upper: Loss, inner: Any, outer: Any, iterations: int) -> list[float]:
    losses = []
    for _ in range(iterations):
        for _ in range(8):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        losses.append(float(outer.step(upper)))
    return losses


@pytest.mark.parametrize("inner_class", [SLS, SPSB])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("start", [-6.0, -3.0])
def test_a_logarithm_is_not_thrown_off(inner_class: Any, direction: str, start: float) -> None:
    x, y, lower, upper = penalties(torch.exp, start)
    inner = inner_class([y])
    losses = run(x, y, lower, upper, inner, BiSPS([x], lower=inner, direction=direction), 1)
    # e^a - 1 = 4 (e^(a/2) - 1) at a = 2 log 3
    assert x.detach().sub(start).max() < 4.0
    losses += run(x, y, lower, upper, inner, BiSPS([x], lower=inner, direction=direction), 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: x.sigmoid()], ids=["linear", "saturating"])
def test_where_the_lower_gradient_follows_x_the_bound_is_that_of_polyak(answer: Any) -> None:
    x, y, lower, upper = penalties(answer, 0.5)
    inner = SLS([y])
    outer = BiSPS([x], lower=inner)
    (loss,) = run(x, y, lower, upper, inner, outer, 1)
    assert x.grad is not None
    assert outer.param_groups[0]["step_size"] == pytest.approx(loss / float(x.grad @ x.grad))
    assert (outer.evaluations.upper.values, outer.evaluations.lower.gradients) == (1, 3)
    run(x, y, lower, upper, inner, outer, 2)
    assert (outer.evaluations.upper.values, outer.evaluations.lower.gradients) == (3, 3)


def test_a_lower_loss_that_is_not_known_is_not_asked() -> None:
    x, y, lower, upper = penalties(torch.exp, -3.0)
    inner = torch.optim.SGD([y], lr=1e-2)
    outer = BiSPS([x], lower=inner)
    for _ in range(5):
        inner.zero_grad()
        lower().backward()
        inner.step()
    assign([x], implicit(upper, lower, [x], [y]))
    outer.step(upper)
    assert outer.evaluations.lower.gradients == 0
    assert outer.record is not None and outer.record.moved


def test_the_lower_variable_stays() -> None:
    x, y, lower, upper = penalties(torch.exp, -3.0)
    inner = SLS([y])
    for _ in range(4):
        inner.step(lower)
    assign([x], implicit(upper, lower, [x], [y]))
    before = y.detach().clone()
    BiSPS([x], lower=inner).step(upper)
    assert torch.equal(y, before)
    assert y.grad is None
