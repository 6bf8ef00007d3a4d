"""What a closure may return: one real number; all else is refused, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS
from adaptive_bilevel.errors import ClosureError
from tests.optim.helpers import OptimizerInfo, every_class, every_search, plain, snapshot

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "vector": lambda x: x**2,
    "empty": lambda x: (x**2)[:0],
    "detached": lambda x: (x**2).sum().detach(),
    "number": lambda x: 3.0,
    "none": lambda x: None,
    "text": lambda x: "loss",
    "complex": lambda x: torch.complex(x, x).sum(),
    "whole": lambda x: (x**2).sum().long(),
    "pair": lambda x: ((x**2).sum(), x),
    "sparse": lambda x: (x**2).sum().reshape(1).to_sparse(),
}


@every_class
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_loss_is_refused(info: OptimizerInfo, kind: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x])
    optimizer.step(lambda: (x**2).sum())
    before = snapshot(model, optimizer), plain(x)

    def closure() -> Any:
        model(torch.randn(4, 2))
        return WRONG[kind](x)

    with pytest.raises(ClosureError, match="closure returned") as caught:
        optimizer.step(closure)
    assert isinstance(caught.value, TypeError)
    assert (snapshot(model, optimizer), plain(x)) == before


@every_search
def test_a_trial_that_is_no_loss_is_refused(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1e3)
    before = plain([x, optimizer.state_dict()])
    calls = iter(range(10))
    with pytest.raises(ClosureError):
        optimizer.step(lambda: (x**2).sum() if next(calls) < 2 else x**2)
    assert plain([x, optimizer.state_dict()]) == before


def test_a_zero_dimensional_numpy_loss_in_trials() -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = SLS([x], 0.1)
    optimizer.step(lambda: (x**2).sum() if torch.is_grad_enabled() else (x**2).sum().numpy())
    assert optimizer.param_groups[0]["step_size"] > 0.0
