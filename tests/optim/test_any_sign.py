"""Losses of any sign, at their bound, and gradients that are not theirs: the first step of every search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, AutoSLS, BiSLS, OneStepBiSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.optim.projection import Box
from adaptive_bilevel.policies import Outcome

LOWER = [SLS, SLSB, AutoSLS]
every_lower = pytest.mark.parametrize("cls", LOWER)
every_direction = pytest.mark.parametrize("direction", ["sgd", "adam"])


def bowl(d: int = 7) -> tuple[Tensor, Callable[[], Tensor]]:
    curvature = torch.linspace(0.3, 2.0, d, dtype=torch.float64)
    w = torch.linspace(1.0, 2.0, d, dtype=torch.float64).requires_grad_()
    return w, lambda: 0.5 * (curvature * w**2).sum()


@every_lower
@every_direction
@pytest.mark.parametrize("options", [{}, {"lower_bound": None}], ids=repr)
@pytest.mark.parametrize("shift", [-1e4, -20.0, -bowl()[1]().item()])
def test_a_loss_of_any_sign(cls: Any, direction: str, options: dict[str, Any], shift: float) -> None:
    w, f = bowl()
    start, optimizer = f().item(), cls([w], direction=direction, **options)
    for _ in range(40):
        optimizer.step(lambda: f() + shift)
    assert f().item() < 0.05 * start
    assert optimizer.param_groups[0]["lr"] == 1.0


def levels(shift: float) -> tuple[Tensor, Tensor, Callable[[], Tensor], Callable[[], Tensor]]:
    """y*(x) = x / (1 + w), f = |y - 1|^2 / 2, both shifted."""
    w = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
    x, y = torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64).requires_grad_(), torch.zeros(3, dtype=torch.float64)
    y.requires_grad_()
    return x, y, lambda: 0.5 * ((y - x) ** 2 + w * y**2).sum() + shift, lambda: 0.5 * ((y - 1.0) ** 2).sum() + shift


@pytest.mark.parametrize("cls", [BiSLS, OneStepBiSLS])
@pytest.mark.parametrize("inner_class", LOWER)
@pytest.mark.parametrize("low", [None, 0.0])
@pytest.mark.parametrize("project", [None, Box(-5.0, 5.0)], ids=["free", "box"])
def test_both_levels_below_the_bound(cls: Any, inner_class: Any, low: float | None, project: Any) -> None:
    x, y, lower, upper = levels(-70.0)
    inner = inner_class([y], lower_bound=low)
    outer = cls([x], lower=inner, lower_bound=low, project=project)
    for _ in range(25):
        for _ in range(5):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        outer.step(upper)
        assert bool((x.abs() <= 5.0).all()) or project is None
    for _ in range(20):
        inner.step(lower)
    assert upper().item() + 70.0 < 0.05


@pytest.mark.parametrize("exponent", [-40, -13, 13, 40])
@pytest.mark.parametrize("cls", LOWER)
def test_the_unit_of_loss_or_parameters_changes_nothing(cls: Any, exponent: int) -> None:
    def run(s: float, t: float) -> Tensor:
        w, _ = bowl()
        v = (w.detach() * t).requires_grad_()
        curvature, optimizer = torch.linspace(0.3, 2.0, 7, dtype=torch.float64), cls([v], lower_bound=None)
        for _ in range(8):
            optimizer.step(lambda: s * (0.5 * (curvature * (v / t) ** 2).sum() - 30.0))
        return v.detach() / t

    unit = 2.0**exponent
    expected = run(1.0, 1.0)
    assert torch.equal(run(unit, 1.0), expected)
    assert torch.equal(run(1.0, unit), expected)


class Wrong(torch.autograd.Function):
    """3 |w|^2 + 1 with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return 3.0 * (w**2).sum() + 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -6.0 * ctx.saved_tensors[0] * grads[0]


@every_lower
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [0, 3])
def test_a_sample_gone_wrong_spoils_no_later_step(cls: Any, dtype: torch.dtype, after: int) -> None:
    if cls is AutoSLS and after:
        pytest.skip("a variable that starts anew in each step shows as samples that disagree")
    w = torch.tensor([2.0, -1.0, 0.5], dtype=dtype).requires_grad_()
    optimizer = cls([w])

    def right() -> Tensor:
        return 3.0 * (w**2).sum() + 1.0

    for _ in range(after):
        optimizer.step(right)
        with torch.no_grad():
            w.copy_(torch.tensor([2.0, -1.0, 0.5], dtype=dtype))
    before = w.detach().clone()
    with pytest.warns(AdaptiveBilevelWarning, match="no trial step gave sufficient decrease"):
        optimizer.step(lambda: Wrong.apply(w))
    assert torch.equal(w, before)
    start = right().item()
    for _ in range(4):
        optimizer.step(right)
    assert right().item() - 1.0 < 0.2 * (start - 1.0)


@every_lower
def test_a_loss_that_rounds_to_its_bound(cls: Any) -> None:
    w = torch.tensor([[40.0, 0.0, 1.0], [1.0, 30.0, 0.0]], dtype=torch.float32).requires_grad_()
    optimizer, calls = cls([w]), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(w, torch.tensor([0, 1]))

    for _ in range(6):
        optimizer.step(loss)
        assert optimizer.record.outcome in (Outcome.at_lower_bound, Outcome.zero_gradient)
    assert calls <= 18
