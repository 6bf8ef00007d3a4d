"""The first step of a Polyak rule that nobody gave a bound: it is tried, and does not ascend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.policies import Outcome
from tests.optim.helpers import OptimizerInfo, every_class, every_polyak


def valley(x: Tensor) -> Tensor:
    """x^2 / (1 + x^2): far out it is flat, and Polyak's ratio beyond the minimizer by far."""
    return (x**2 / (1.0 + x**2)).sum()


@every_polyak
@pytest.mark.parametrize("where", [3.0, 10.0, 1e3])
def test_a_first_step_does_not_ascend(info: OptimizerInfo, where: float) -> None:
    x = nn.Parameter(torch.tensor([where]))
    optimizer = info.make([x], None)
    first = float(optimizer.step(lambda: valley(x)))
    assert optimizer.record.moved and optimizer.record.trials == optimizer.evaluations.lower.values > 1
    assert float(valley(x.detach())) <= first
    assert optimizer._workspace.copies == []
    tried = optimizer.evaluations.lower.values
    optimizer.step(lambda: valley(x))
    assert optimizer.evaluations.lower.values == tried


@every_polyak
def test_two_samples_try_the_one_of_the_step(info: OptimizerInfo) -> None:
    """x0^2 gives the direction, 100 x0^2 the step: what does not raise that raises neither."""
    seen: list[float] = []

    def rule() -> Tensor:
        seen.append(x.item())
        return 100.0 * (x**2).sum()

    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = info.make([x], None)
    optimizer.step(lambda: (x**2).sum(), step_closure=rule)
    assert len(seen) == 1 + optimizer.record.trials > 1
    assert seen[0] == 1.0 and abs(seen[-1]) <= 1.0


@every_class
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_no_first_step_without_descent(info: OptimizerInfo, value: float) -> None:
    """The loss goes up along the negative of its gradient, or is not a number: nothing moves, and nothing is kept."""
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = info.make([x], None)

    def wrong() -> Tensor:
        return (2.0 - x).sum() + 2.0 * (x - x.detach()).sum() + (0.0 if x.item() == 1.0 else value - value)

    with pytest.warns(AdaptiveBilevelWarning, match="no trial step"):
        optimizer.step(wrong)
    assert optimizer.record.outcome == Outcome.search_failed
    assert x.item() == 1.0
    assert "policy" not in optimizer.state
