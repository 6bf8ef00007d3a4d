"""Differentiating through the steps of an unrolled loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from adaptive_bilevel import policies
from adaptive_bilevel_torchopt import (
    FuncOptimizer,
    PolyakLR,
    chain,
    scale_by_policy,
)
from tests.torchopt.trees import SCALES

RULES: dict[str, Any] = {
    "spsmax": policies.SPSMax(bound=10.0),
    "spsmax at its bound": policies.SPSMax(bound=1e-2),
    "spsb": policies.SPSB(bound=0.08),
    "decsps": policies.DecSPS(bound=0.5),
    "envelope": policies.Envelope(bound=1.0, floor=1e-3, c=4.0),
    "envelope at its floor": policies.Envelope(bound=1.0, floor=0.3),
    "envelope at its bound": policies.Envelope(bound=0.05, floor=0.01),
    "found": policies.SPSMax(),
}


def unroll(
    policy: Any, x: Tensor, differentiable: bool, fixed: list[float] | None = None
) -> tuple[Tensor, list[float]]:
    """A validation loss after four lower steps from x, and the steps; `fixed` are taken in the place of the rule's."""
    y: tuple[Tensor, ...] = (x * 1.0,)
    optimizer: Any = FuncOptimizer(chain(torchopt.sgd(lr=1.0), scale_by_policy(policy, differentiable=differentiable)))
    steps = []
    for k in range(4):
        lower = 0.5 * (SCALES * (y[0] - x.sin()).square()).sum() + 0.05 * x.exp().sum() * y[0].square().sum()
        if fixed is None:
            y = optimizer.step(lower, y)
            steps.append(float(optimizer.optim_state[1].record.step_size))
        else:
            (grad,) = torch.autograd.grad(lower, y, create_graph=True)
            y = (y[0] - fixed[k] * grad,)
    return (y[0] - 0.3).square().sum() + x.square().sum(), steps


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_the_gradient_through_a_polyak_step_is_that_of_finite_differences(name: str, differentiable: bool) -> None:
    policy, h = RULES[name], 1e-6
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    value, steps = unroll(policy, x, differentiable)
    (gradient,) = torch.autograd.grad(value, x)
    fixed = None if differentiable else steps
    numerical = []
    for e in torch.eye(2, dtype=torch.float64) * h:
        ends = [unroll(policy, (x.detach() + s * e).requires_grad_(), differentiable, fixed)[0] for s in (1, -1)]
        numerical.append(float((ends[0] - ends[1]).detach()) / (2 * h))
    assert gradient.tolist() == pytest.approx(numerical, rel=1e-5, abs=1e-7)


def test_constant_and_differentiable_steps_have_different_gradients() -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    ends = [torch.autograd.grad(unroll(RULES["spsmax"], x, d)[0], x)[0] for d in (False, True)]
    assert (ends[0] - ends[1]).norm() > 0.05 * ends[0].norm()


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_learning_rate_is_differentiable_on_request(differentiable: bool) -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    lr = PolyakLR(policies.SPSMax(bound=10.0), differentiable=differentiable)
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=lr))
    y: tuple[Tensor, ...] = (x * 1.0,)
    lower = 0.5 * (SCALES * (y[0] - x.sin()).square()).sum()
    lr.tell(lower, torch.autograd.grad(lower, y, create_graph=True))
    y = optimizer.step(lower, y)
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    assert lr.record is not None
    step = float(lr.record.step_size)
    if differentiable:

        def end(x: Tensor) -> Tensor:
            residual = SCALES * (x - x.sin())
            return x - 0.5 * (residual * (x - x.sin())).sum() / residual.square().sum() * residual

    else:

        def end(x: Tensor) -> Tensor:
            return x - step * SCALES * (x - x.sin())

    # y starts at x, so the whole step is a function of x.
    expected = torch.func.grad(lambda x: end(x).sum())(x.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_unrolled_loops_go_on_after_an_outer_iteration(name: str, differentiable: bool) -> None:
    """MetaSGD with a Polyak learning rate; its state is cut from the graph as TorchOpt's is."""
    x = torch.tensor([0.9, -0.4], dtype=torch.float64)
    h = 1e-6

    def outer(x: Tensor, iterations: int, steps: list[float] | None = None) -> tuple[Tensor, list[float]]:
        net = torch.nn.Linear(2, 1, bias=False).double()
        net.weight.data.fill_(0.3)
        rates, taken = iter(steps or []), []
        lr: Any = PolyakLR(RULES[name], differentiable=differentiable) if steps is None else lambda _: next(rates)
        optimizer = torchopt.MetaSGD(net, lr=lr)
        value = torch.zeros(())
        for _ in range(iterations):
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(optimizer)
            if steps is None:
                lr.stop_gradient()
            for _ in range(2):
                y = net.weight[0]
                loss = 0.5 * (SCALES * (y - x.sin()).square()).sum() + 0.05 * x.exp().sum() * y.square().sum()
                if steps is None:
                    lr.tell(loss, torch.autograd.grad(loss, list(net.parameters()), create_graph=True))
                    taken.append(float(lr.record.step_size))
                optimizer.step(loss)
            value = (net.weight - 0.3).square().sum() + x.square().sum()
            if iterations > 1:
                torch.autograd.grad(value, x)  # frees the graph
        return value, taken

    outer(x.clone().requires_grad_(), 3)
    at = x.clone().requires_grad_()
    value, fixed = outer(at, 1)
    (gradient,) = torch.autograd.grad(value, at)
    numerical = []
    for e in torch.eye(2, dtype=torch.float64) * h:
        ends = [outer((x + s * e).requires_grad_(), 1, None if differentiable else fixed)[0] for s in (1, -1)]
        numerical.append(float((ends[0] - ends[1]).detach()) / (2 * h))
    assert gradient.tolist() == pytest.approx(numerical, rel=1e-5, abs=1e-7)


def test_functional_state_is_cut_as_torchopt_s_is() -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer: Any = FuncOptimizer(chain(torchopt.sgd(lr=1.0), scale_by_policy(RULES["decsps"], differentiable=True)))
    for _ in range(3):
        y: Any = (x * 1.0,)
        for _ in range(2):
            y = optimizer.step(0.5 * (SCALES * (y[0] - x.sin()).square()).sum(), y)
        torch.autograd.grad(y[0].sum(), x)
        torchopt.stop_gradient(optimizer.optim_state)
