"""Polyak steps as a learning rate of TorchOpt's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

import adaptive_bilevel as ab
from adaptive_bilevel import policies
from adaptive_bilevel.errors import LowerLevelError, NonFiniteError, TensorError
from adaptive_bilevel_torchopt import (
    PolyakLR,
    scale_by_spsmax,
)
from tests.torchopt.trees import gradients, loss, start


def test_polyak_steps_through_stock_chains_and_optimizers() -> None:
    """One step for all leaves, and the same steps as the core's."""
    params, params2, params3 = start(), start(), start()
    reference = ab.SPSB(list(params3.values()), 0.3)
    lr = PolyakLR(policies.SPSB(bound=0.3))
    optimizer = torchopt.SGD(list(params.values()), lr=lr)
    lr2 = PolyakLR(policies.SPSB(bound=0.3))
    functional = torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=1e9), torchopt.sgd(lr=lr2))
    state = functional.init(params2)
    for _ in range(6):
        value = loss(params)
        optimizer.zero_grad()
        value.backward()
        lr.tell(value, [p.grad for p in params.values()])
        optimizer.step()
        value2, grad2 = gradients(params2)
        lr2.tell(value2, grad2)
        updates, state = functional.update(grad2, state, params=params2, inplace=False)
        params2 = {k: p.detach().requires_grad_() for k, p in torchopt.apply_updates(params2, updates).items()}
        reference.step(lambda: loss(params3))
    for a, b, c in zip(params.values(), params2.values(), params3.values(), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-15)
    other = PolyakLR(policies.SPSB(bound=0.3))
    other.load_state_dict(lr.state_dict())
    for each in (lr, other):
        each.tell(1.0, [torch.ones(2)])
    assert float(lr(0)) == float(other(0))


def test_an_update_that_was_told_nothing_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    lr = PolyakLR()
    optimizer = torchopt.SGD([x], lr=lr)
    x.square().sum().backward()
    with pytest.raises(LowerLevelError, match="tell"):
        optimizer.step()
    lr.tell(x.square().sum(), [x.grad])
    optimizer.step()
    with pytest.raises(LowerLevelError, match="update 1 was not told"):
        optimizer.step()


@pytest.mark.parametrize("rule", ["spsb", "decsps", "spsb, differentiable", "sls"])
@pytest.mark.parametrize("where", ["loss", "gradient", "direction", "overflow"])
def test_a_loss_that_is_not_finite_is_refused(where: str, rule: str) -> None:
    """TorchOpt multiplies, and 0 times NaN is NaN."""
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    policy: Any = {"sls": policies.SLS(start=0.3), "decsps": policies.DecSPS(bound=0.3)}.get(
        rule, policies.SPSB(bound=0.3)
    )
    lr = PolyakLR(policy, differentiable="differentiable" in rule)
    options: Any = {"trial": lambda step: 0.0} if rule == "sls" else {}
    optimizer = torchopt.SGD([x], lr=lr)
    for good in (True, False, True):
        at, before = x.detach().clone(), (lr.state_dict(), lr.record)
        value = x.square().sum()
        optimizer.zero_grad()
        value.backward()
        grad: Any = x.grad
        bad = torch.full_like(grad, 1e200 if where == "overflow" else float("nan"))
        told: Any = {"loss": [value * float("nan"), [grad]], "direction": [value, [grad], [bad]]}.get(
            where, [value, [bad]]
        )
        if not good:
            with pytest.raises(NonFiniteError, match=r"PolyakLR\.tell.*not finite.*skip this update"):
                lr.tell(*told, **options)
            assert (lr.state_dict(), lr.record) == before
            with pytest.raises(LowerLevelError, match="was not told"):
                optimizer.step()
            assert torch.equal(x, at)
        else:
            lr.tell(value, [grad], **options)
            optimizer.step()
            assert bool(x.isfinite().all()) and not torch.equal(x, at)


def test_gradients_and_directions_are_paired_leaf_by_leaf() -> None:
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0])
    lr = PolyakLR(policies.SPSMax())
    lr.tell(1.0, {"a": None, "b": b, "c": c}, {"a": a, "b": a, "c": None})
    assert lr.record is not None and float(lr.record.slope) == float(a @ b)
    optimizer = scale_by_spsmax()
    for grads, along in (([a], [a, b]), ([a, b], [a]), ([a], [c])):
        with pytest.raises(TensorError, match=r"PolyakLR\.tell.*shapes.*one for each"):
            lr.tell(1.0, grads, along)
        with pytest.raises(TensorError, match=r"scale_by_spsmax.*shapes.*one for each"):
            optimizer.update(along, optimizer.init(along), params=along, value=1.0, grad=grads)


def test_a_search_may_be_told_its_trials() -> None:
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    lr = PolyakLR(policies.SLS(start=10.0))
    optimizer = torchopt.SGD([x], lr=lr)
    value = (x**2).sum()
    value.backward()
    assert x.grad is not None
    grad = x.grad.clone()
    lr.tell(value, [grad], trial=lambda step: float(((x.detach() - step * grad) ** 2).sum()))
    optimizer.step()
    assert lr.record is not None and lr.record.trials > 1
    assert (x**2).sum() < value
