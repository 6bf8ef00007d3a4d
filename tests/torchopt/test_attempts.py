"""A trial of a transformation or of a lower step that cannot be computed is rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

from adaptive_bilevel_torchopt import chain, scale_by_sls, scale_by_slsb, scale_by_spsb


def _loss(params: Any) -> Any:
    s = params["s"]
    if float(s.detach()) <= 0.5:
        raise ValueError("scale must be positive")
    return (s - 1.0).square()


@pytest.mark.parametrize("rule", [lambda: scale_by_sls(1e4), lambda: scale_by_slsb(1e4), scale_by_spsb])
def test_a_trial_that_cannot_be_computed_is_rejected(rule: Any) -> None:
    params = {"s": torch.tensor(3.0, requires_grad=True)}
    optimizer = chain(torchopt.sgd(lr=1.0), rule())
    state = optimizer.init(params)
    value = _loss(params)
    grad = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    updates, state = optimizer.update(grad, state, params=params, inplace=False, value=value, grad=grad, value_fn=_loss)
    moved = torchopt.apply_updates(params, updates, inplace=False)
    assert 0.5 < float(moved["s"].detach()) < 3.0
