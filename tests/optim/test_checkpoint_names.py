"""States that torch.distributed.checkpoint renames by the names of parameters, from every class."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import ClosureError
from tests.optim.helpers import OptimizerInfo, every_optimizer, plain

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _written(state: Any) -> Any:
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_optimizer
@pytest.mark.parametrize("before", [0, 3])
def test_a_run_goes_on_where_it_was(info: OptimizerInfo, before: int) -> None:
    model, other = _model(0), _model(1)
    first = info.make([{"params": model[0].parameters()}, {"params": model[2].parameters()}], None)
    second = info.make([{"params": other[0].parameters()}, {"params": other[2].parameters()}], None)
    for _ in range(before):
        first.step(lambda: model(X).square().mean())
    saved = get_optimizer_state_dict(model, first)
    assert all(name in dict(model.named_parameters()) for name in saved["state"])
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, second, optim_state_dict=_written(saved))
    assert plain(second.state_dict()) == plain(first.state_dict())
    for _ in range(3):
        first.step(lambda: model(X).square().mean())
        second.step(lambda: other(X).square().mean())
    assert plain(other.state_dict()) == plain(model.state_dict())


@pytest.mark.parametrize("cls", [BiSLS, BiSPS, OneStepBiSLS])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_of_an_upper_optimizer(cls: Any, direction: str) -> None:
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        hyper, y = nn.Linear(2, 1).double(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
        inner = SLS([y])
        runs.append((hyper, y, inner, cls(hyper.parameters(), lower=inner, direction=direction)))

    def iterate(hyper: Any, y: Any, inner: Any, outer: Any) -> None:
        def lower() -> Tensor:
            return (y - hyper.weight.sum()).square().sum() + y.square().sum()

        inner.step(lower)
        for p in hyper.parameters():
            p.grad = 2.0 * p.detach()
        outer.step(lambda: sum(p.square().sum() for p in hyper.parameters()) + 0.0 * y.sum())

    (one, y1, _, outer1), (two, y2, _, outer2) = runs
    for _ in range(3):
        iterate(*runs[0])
    two.load_state_dict(one.state_dict())
    runs[1][2].load_state_dict(runs[0][2].state_dict())
    with torch.no_grad():
        y2.copy_(y1)
    for p in two.parameters():
        p.grad = None
    set_optimizer_state_dict(two, outer2, optim_state_dict=_written(get_optimizer_state_dict(one, outer1)))
    for _ in range(2):
        iterate(*runs[0])
        iterate(*runs[1])
    assert plain(one.state_dict()) == plain(two.state_dict())


@every_optimizer
def test_a_state_with_entries_that_are_no_parameters_is_read(info: OptimizerInfo) -> None:
    """As it was saved before: the state of the rule beside those of the parameters."""
    model = _model(0)
    optimizer = info.make(model.parameters(), None)
    for _ in range(2):
        optimizer.step(lambda: model(X).square().mean())
    saved = optimizer.state_dict()
    shared = saved["param_groups"][0].pop("shared_state")
    earlier = {**saved, "state": {**{k: v for k, v in saved["state"].items() if v}, **shared}}
    other = info.make(_model(1).parameters(), None)
    other.load_state_dict(earlier)
    assert plain(other.state_dict()) == plain(optimizer.state_dict())


@every_optimizer
def test_a_closure_is_still_required(info: OptimizerInfo) -> None:
    """But for the call with which there is to be state: every rate and every gradient is 0."""
    model = _model(0)
    optimizer = info.make(model.parameters(), None)
    with pytest.raises(ClosureError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ClosureError):
        optimizer.step()
