"""A snapshot is what code around whole steps puts back: random state, and buffers, replaced ones too."""

from __future__ import annotations

import torch
from torch import nn

from adaptive_bilevel.evaluation.guard import Snapshot


def test_random_state_and_buffers_come_back() -> None:
    module, plain = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), nn.Linear(3, 3)
    torch.manual_seed(0)
    module(torch.randn(4, 3))
    norm = module[0]
    buffers = [b.clone() for b in norm.buffers()]
    kept = norm.running_mean
    snapshot = Snapshot([module, plain], [])
    expected = torch.rand(2)
    for _ in range(2):
        module(torch.randn(4, 3))
        norm.running_var = torch.zeros(3)  # replaced, not written to
        snapshot.restore()
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), buffers, strict=True))
        assert torch.equal(torch.rand(2), expected)
    assert norm.running_mean is kept


def test_modules_without_buffers() -> None:
    snapshot = Snapshot([nn.Linear(2, 2)], [])
    expected = torch.rand(2)
    snapshot.restore()
    assert torch.equal(torch.rand(2), expected)
