"""Constant policies: TorchOpt's own updates to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from adaptive_bilevel.policies import Constant
from adaptive_bilevel_torchopt import LowerStep, UpperStep
from tests.problems import ridge_hpo
from tests.torchopt.modules import EXACT_CG, SOLVE, implicit_module, iterate, leaf, pair


class Two(torchopt.nn.ImplicitMetaGradientModule, linear_solve=SOLVE.solve_cg()):
    """Ridge regression with weights and a bias, both levels in minibatches: plain, or with our steps."""

    def __init__(self, x: Tensor, dtype: torch.dtype = torch.float64, lower: Any = None) -> None:
        super().__init__()
        self.x = x
        self.weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        self.lower: Any = None if lower is None else LowerStep(self, lower)

    def fit(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (inputs @ self.weight + self.bias - targets).square().mean()

    def objective(self, batch: Any) -> Tensor:
        penalty = (self.x.exp()[:, None] * self.weight.square()).sum() + 0.1 * self.bias.square().sum()
        return self.fit(batch) + penalty

    def solve(self, batch: Any) -> None:
        params = tuple(self.parameters())
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(3):
                step(lambda: self.objective(batch))
            return
        for p in params:
            p.detach_().requires_grad_()
        optimizer = torchopt.SGD(params, lr=0.1)
        with torch.enable_grad():
            for _ in range(3):
                loss = self.objective(batch)
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()


def regression(count: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    rng = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    truth = normal(4, 2)
    inputs = [normal(12, 4) for _ in range(2 * count)]
    pairs = [(a, a @ truth + 0.3 * normal(12, 2)) for a in inputs]
    return list(zip(pairs[::2], pairs[1::2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("upper", "direction"),
    [("SGD", "sgd"), ("Adam", "adam"), ("Adam", torchopt.adam(lr=1.0))],
    ids=["SGD", "Adam", "TorchOpt's Adam"],
)
def test_constant_policies_are_torchopt_to_the_bit(upper: str, direction: Any, dtype: torch.dtype) -> None:
    lr = {"SGD": 0.3, "Adam": 0.03}[upper]
    ends = []
    for automatic in (False, True):
        x = torch.zeros(4, dtype=dtype, requires_grad=True)
        inner = Two(x, dtype, Constant(bound=0.1) if automatic else None)
        if automatic:
            meta: Any = UpperStep([x], Constant(bound=lr), lower=inner.lower, direction=direction)
        else:
            meta = getattr(torchopt, upper)([x], lr=lr)
        for train, val in regression(50, dtype):
            inner.solve(train)
            if automatic:
                meta.step(lambda: inner.fit(val))
            else:
                loss = inner.fit(val)
                meta.zero_grad()
                loss.backward()
                meta.step()
        ends.append([x.detach(), inner.weight.detach(), inner.bias.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert ends[0][0].abs().max() > 0.1, "it went somewhere"


@pytest.mark.parametrize(
    "direction", ["adam", torchopt.adam(lr=1.0, betas=(0.95, 0.9), eps=1e-4)], ids=["ours", "TorchOpt's"]
)
def test_a_constant_step_is_taken_whether_the_direction_descends_or_not(direction: Any) -> None:
    """Adam's does not, after it has passed a minimum: TorchOpt steps on."""
    problem = ridge_hpo()
    adam: Any = {"betas": (0.95, 0.9), "eps": 1e-4}
    inner, meta, x = pair(
        problem,
        lower={"rule": Constant(bound=0.1)},
        rule=Constant(bound=0.3),
        direction=direction,
        **(adam if direction == "adam" else {}),
    )
    x2 = leaf(problem)
    plain_inner = implicit_module(EXACT_CG)(x2, problem)
    plain_meta: Any = torchopt.Adam([x2], lr=0.3, **adam)
    ascents = 0
    for _ in range(50):
        iterate(inner, meta)
        plain_inner.solve()
        plain_meta.zero_grad()
        plain_inner.val().backward()
        before = x2.detach().clone()
        plain_meta.step()
        assert x2.grad is not None
        ascents += bool((before - x2.detach()) @ x2.grad < 0.0)
    assert torch.equal(x, x2) and torch.equal(inner.y, plain_inner.y)
    assert ascents >= 3


@pytest.mark.parametrize("decay", ["inverse_sqrt", "inverse"])
def test_a_constant_policy_may_decay(decay: Any) -> None:
    inner, meta, _ = pair(ridge_hpo(), lower={"rule": Constant(bound=0.1)}, rule=Constant(bound=0.2, decay=decay))
    steps = [float(iterate(inner, meta).step_size) for _ in range(4)]
    power = {"inverse_sqrt": 0.5, "inverse": 1.0}[decay]
    assert steps == pytest.approx([0.2 / (k + 1) ** power for k in range(4)])
