"""Parameters of every kind: short and mixed dtypes, frozen and unused ones, their storage, sparse gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import TensorError
from adaptive_bilevel.policies import Outcome
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    every_class,
    every_optimizer,
    leaf,
    net,
    quadratic,
    run,
    snapshot,
)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_short_dtypes(info: OptimizerInfo, dtype: torch.dtype) -> None:
    x = leaf(3.0, 2.0, dtype=dtype)
    options = {"eps": 1e-4} if "direction" in info.options else {}
    optimizer = info.make([x], None, **options)
    first = quadratic(x).item()
    for _ in range(5):
        optimizer.step(lambda: quadratic(x))
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    assert quadratic(x).item() < 0.5 * first
    assert isinstance(optimizer.record.slope, float)


@every_optimizer
def test_mixed_dtypes_and_shapes(info: OptimizerInfo) -> None:
    params = [
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.float32).t()),
        nn.Parameter(torch.empty(0)),
        nn.Parameter(torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last)),
    ]
    optimizer = info.make(params, None)
    losses = [float(optimizer.step(lambda: sum((p.double() ** 2).sum() for p in params))) for _ in range(10)]
    assert losses[-1] < losses[0]


@every_optimizer
def test_frozen_and_unused_parameters(info: OptimizerInfo) -> None:
    x, frozen, unused = leaf(), leaf(), leaf()
    frozen.requires_grad_(False)
    optimizer = info.make([frozen, x, unused])
    for _ in range(3):
        optimizer.step(lambda: quadratic(x) + quadratic(frozen))
    assert frozen.tolist() == unused.tolist() == [3.0, 2.0] != x.tolist()
    assert frozen.grad is unused.grad is x.grad is None
    frozen.requires_grad_(True)
    x.requires_grad_(False)
    optimizer.step(lambda: quadratic(x) + quadratic(frozen))
    assert frozen.tolist() != [3.0, 2.0]


@every_optimizer
def test_a_loss_that_no_parameter_enters(info: OptimizerInfo) -> None:
    x, other = leaf(), leaf()
    optimizer = info.make([x])
    optimizer.step(lambda: quadratic(other))
    assert optimizer.record.outcome == Outcome.zero_gradient
    assert other.grad is None
    x.requires_grad_(False)
    optimizer.step(lambda: quadratic(other))
    assert optimizer.record.outcome == Outcome.zero_gradient


@every_optimizer
def test_storage_is_kept(info: OptimizerInfo) -> None:
    model = net()
    pointers = {name: t.data_ptr() for name, t in model.named_parameters()}
    objects = {name: id(t) for name, t in model.named_parameters()}
    run(info.make(model.parameters(), None), model, batches(4))
    assert {name: t.data_ptr() for name, t in model.named_parameters()} == pointers
    assert {name: id(t) for name, t in model.named_parameters()} == objects


@every_class
def test_sparse_gradients_are_refused(info: OptimizerInfo) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = info.make(table.parameters())
    before = snapshot(table, optimizer)
    with pytest.raises(TensorError, match="sparse"):
        optimizer.step(lambda: (table(torch.tensor([1, 2])) ** 2).sum())
    assert snapshot(table, optimizer) == before
