"""Units of f and x do not decide whether a gradient counts as one of rounding errors."""

from __future__ import annotations

import math

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, BiSPS
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.optim.slope_rounding import most_ratio
from adaptive_bilevel.policies.armijo import LARGEST_RATIO
from tests.optim.helpers import OptimizerInfo, every_class

UNITS = [(1.0, 1e20), (1e-20, 1e20), (1e-60, 1.0), (1e40, 1e80)]
every_unit = pytest.mark.parametrize(("f", "x"), UNITS)


@every_unit
@every_class
def test_steps_are_the_same_in_every_unit(info: OptimizerInfo, f: float, x: float) -> None:
    reached = []
    for value, length in ((1.0, 1.0), (f, x)):
        p = torch.tensor([3.0 * length, -2.0 * length], requires_grad=True, dtype=torch.float64)
        curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
        optimizer = info.make([p], None)
        for _ in range(8):
            optimizer.step(lambda p=p, c=curvature, u=length, v=value: v * (c * (p / u) ** 2).sum())
        reached.append(p.detach() / length)
    assert torch.allclose(reached[1], reached[0], rtol=1e-6)
    assert reached[0].norm() < 3.0


@every_unit
@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_upper_steps_move_in_every_unit(upper: type[BiSLS] | type[BiSPS], f: float, x: float) -> None:
    """At the upper level; f saturates far out, so that its gradient is small beside it."""
    p = torch.tensor([3.0 * x], requires_grad=True, dtype=torch.float64)
    y = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    inner = SLS([y])
    outer = upper([p], lower=inner)

    def loss() -> torch.Tensor:
        square = (y**2).sum()
        return f * square / (1.0 + square)

    for _ in range(25):
        for _ in range(3):
            inner.step(lambda: 0.5 * ((y - p / x) ** 2).sum())
        assign([p], implicit(loss, lambda: 0.5 * ((y - p / x) ** 2).sum(), [p], [y]))
        outer.step(loss)
    assert abs(p.item() / x) < 1.0


@pytest.mark.parametrize(("f", "x"), [(1.0, 1.0), *UNITS])
@every_class
def test_a_gradient_of_rounding_errors_moves_nothing_in_any_unit(info: OptimizerInfo, f: float, x: float) -> None:
    """f is at its minimum 1, where its gradient is that of the rounding of x."""
    p = torch.tensor([x], requires_grad=True, dtype=torch.float64)
    start, off = p.detach().clone(), 1.0 + 2.0**-53 - 2.0**-54
    optimizer = info.make([p], None)
    optimizer.step(lambda: f * (1.0 + 0.5 * (p / x - off) ** 2).sum() + f * 2.0**-53 * (p / x).sum())
    assert float((p.detach() - start).abs()) <= 2.0**-50 * x


def test_the_norms_are_taken_where_they_are_needed_only() -> None:
    p = torch.tensor([2.0], dtype=torch.float64)
    for loss, slope in ((1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        assert most_ratio(loss, slope, [], []) == LARGEST_RATIO
    assert most_ratio(1.0, 1e-40, [torch.zeros_like(p)], [p]) == LARGEST_RATIO
    assert most_ratio(1.0, 1e-40, [1e30 * p], [1e-20 * p]) == pytest.approx(1e50 * 2.0**50)
