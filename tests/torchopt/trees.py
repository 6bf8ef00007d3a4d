"""A loss of two leaves, and the loop that descends on it with a transformation."""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import Tensor

Tree = dict[str, Tensor]
SCALES = torch.tensor([1.0, 10.0], dtype=torch.float64)


def loss(params: Any) -> Tensor:
    """Two leaves, not quadratic."""
    return (SCALES * params["a"].square()).sum() + torch.cosh(params["b"] - params["a"].sum()).sum() - 1.0


def start() -> Tree:
    return {
        "a": torch.tensor([1.5, -0.7], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True),
    }


def gradients(params: Any) -> tuple[Tensor, Tree]:
    value = loss(params)
    return value, dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))


def descend(optimizer: Any, steps: int, *, inplace: bool = False, at: Any = None) -> tuple[list[float], Tree, Any]:
    losses: list[float] = []
    params, state = at or (start(), None)
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        value, grad = gradients(params)
        losses.append(float(value.detach()))
        updates, state = optimizer.update(
            grad, state, params=params, inplace=inplace, value=value, grad=grad, value_fn=loss
        )
        params = torchopt.apply_updates(params, updates, inplace=inplace)
        params = {k: p.detach().requires_grad_() for k, p in params.items()}
    return losses, params, state
