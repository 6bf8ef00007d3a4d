"""Layers that a second evaluation disturbs: dropout and BatchNorm at both levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from adaptive_bilevel import SLS
from adaptive_bilevel.errors import (
    HypergradientError,
    TensorError,
)
from adaptive_bilevel.policies import Constant
from adaptive_bilevel_torchopt import LowerStep, UpperStep
from tests.torchopt.modules import SOLVE, Base, batch


class Network(Base, linear_solve=SOLVE.solve_cg()):
    """A lower network on features of an upper one, with what a second evaluation disturbs."""

    def __init__(self, features: nn.Module, layers: list[nn.Module], lower: Any = SLS) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Sequential(nn.Linear(4, 3), *layers, nn.Linear(3, 2))
        self.lower: Any = LowerStep(self, lower) if lower is not None else None

    def objective(self, batch: Any) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return self.loss(batch) + 0.02 * penalty

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.features(batch[0])) - batch[1]).square().mean()

    def solve(self, batch: Any) -> None:
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(3):
                step(lambda: self.objective(batch))
            return
        params = tuple(self.parameters())
        optimizer = torchopt.SGD(params, lr=0.1)
        with torch.enable_grad():
            loss = self.objective(batch)
            loss.backward(inputs=params)
            optimizer.step()


def test_running_statistics_of_batch_norm_count_every_batch_once() -> None:
    """TorchOpt's own backward raises on them in train mode."""
    features = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    inner = Network(features, [nn.BatchNorm1d(3)])
    meta: Any = UpperStep(list(features.parameters()), lower=inner.lower)
    for k in range(3):
        inner.solve(batch(k))
        meta.step(lambda: inner.loss(batch(10 + k)))
        assert meta.record.moved
    for norm in (features[1], inner.head[1]):
        # Three lower steps and one upper step an iteration. A carried start is decided on the first lower sample.
        assert isinstance(norm, nn.BatchNorm1d) and norm.track_running_stats and norm.training
        assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 12
    reference = Network(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), [], lower=None)
    reference.solve(batch(0))
    with pytest.raises(RuntimeError, match="in-place"):
        reference.loss(batch(1)).backward()


def test_dropout_draws_the_mask_of_the_lower_step_again() -> None:
    torch.manual_seed(1)
    features = nn.Linear(5, 4)
    inner = Network(features, [nn.Dropout(0.5)], lower=Constant(bound=1e-12))
    meta: Any = UpperStep(list(features.parameters()), lower=inner.lower)
    train, val = batch(0), batch(1)
    inner.solve(train)
    assert inner.lower is not None
    optimizer: Any = inner.lower.optimizer
    x, y = ([p.detach().clone().requires_grad_() for p in ps] for ps in (features.parameters(), inner.parameters()))
    state = torch.get_rng_state()
    meta.step(lambda: inner.loss(val))
    after = torch.get_rng_state()
    h = torch.cat([p.grad.reshape(-1) for p in features.parameters() if p.grad is not None])

    # The same by hand, dense: one mask for the lower loss, one for the upper.
    optimizer.sample.random.restore()
    lower_mask = nn.functional.dropout(torch.ones(10, 3), 0.5)
    torch.set_rng_state(state)
    upper_mask = nn.functional.dropout(torch.ones(10, 3), 0.5)
    assert torch.equal(torch.get_rng_state(), after), "an upper step consumes what one evaluation consumes"

    def f(x: Any, y: Any, data: Any, mask: Tensor) -> Tensor:
        hidden = (data[0] @ x[0].T + x[1]) @ y[0].T + y[1]
        return (((hidden * mask) @ y[2].T + y[3]) - data[1]).square().mean()

    g = f(x, y, train, lower_mask) + 0.02 * torch.stack([p.square().sum() for p in y]).sum()
    g_y = torch.cat([t.reshape(-1) for t in torch.autograd.grad(g, y, create_graph=True)])
    H = torch.stack([torch.cat([t.reshape(-1) for t in torch.autograd.grad(v, y, retain_graph=True)]) for v in g_y])
    upper = f(x, y, val, upper_mask)
    f_y = torch.cat([t.reshape(-1) for t in torch.autograd.grad(upper, y, retain_graph=True)])
    f_x = torch.cat([t.reshape(-1) for t in torch.autograd.grad(upper, x)])
    cross = torch.autograd.grad(g_y @ torch.linalg.solve(H, f_y).detach(), x)
    expected = f_x - torch.cat([t.reshape(-1) for t in cross])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-7)


def test_dropout_in_a_loop_of_ones_own_is_refused() -> None:
    features = nn.Linear(5, 4)
    inner = Network(features, [nn.Dropout(0.5)], lower=None)
    meta: Any = UpperStep(list(features.parameters()), lower=inner)
    inner.solve(batch(0))
    state = torch.get_rng_state()
    with pytest.raises(HypergradientError, match=r"random numbers \(dropout\?\).*LowerStep"):
        meta.step(lambda: inner.loss(batch(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_in_eval_mode_is_not_taken_for_upper_parameters() -> None:
    features = nn.Linear(5, 4).eval()
    inner = Network(features, [])
    with pytest.raises(TensorError, match=r"eval mode.*torchopt#144.*\.train\(\)"):
        UpperStep(list(features.parameters()), lower=inner.lower)
