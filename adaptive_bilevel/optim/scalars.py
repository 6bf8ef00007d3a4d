"""From tensors to the scalars that policies see: sums over all tensors of a level, and agreement between processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["agree", "inner", "on_host", "on_host_with_inner"]


def inner(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return sum_i w_i <left_i, right_i> as a 0-dim tensor, accumulated in float32 at least."""
    if not left:
        return torch.zeros(())
    products = _products(left, right, weights)
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def on_host_with_inner(
    scalar: Tensor | float, left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return a scalar and an inner product as agreed, as Python numbers, by one read of all that they consist of."""
    if not left or _world_size() > 1:
        number, product = on_host(scalar, inner(left, right, weights))
        return number, product
    products = _products(left, right, weights)
    if not isinstance(scalar, Tensor):
        return scalar, sum(torch.stack(products).tolist())
    number, *terms = torch.stack([scalar.to(products[0].device), *products]).tolist()
    return number, sum(terms)


def _products(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    products = [_dot(a, b) for a, b in zip(left, right, strict=True)]
    if weights is not None and any(w != 1.0 for w in weights):
        products = [p if w == 1.0 else p * w for p, w in zip(products, weights, strict=True)]
    first = products[0]
    if any(p.dtype is not first.dtype or p.device != first.device for p in products):
        widest = functools.reduce(torch.promote_types, (p.dtype for p in products))
        products = [p.to(device=first.device, dtype=widest) for p in products]
    return products


_SHORT = (torch.float16, torch.bfloat16)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 1:
        # Often both are the same gradient, and a view costs as much as a small product.
        a, b = (a.reshape(-1),) * 2 if a is b else (a.reshape(-1), b.reshape(-1))
    return torch.dot(a.float(), b.float()) if a.dtype in _SHORT else torch.dot(a, b)


def _world_size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def agree(*scalars: Tensor | float) -> tuple[Tensor | float, ...]:
    """Return the scalars, averaged over all processes under torch.distributed, so that every rank decides alike."""
    world = _world_size()
    if world == 1:
        return scalars
    device = next((s.device for s in scalars if isinstance(s, Tensor)), torch.device("cpu"))
    packed = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device).reshape(()) for s in scalars])
    torch.distributed.all_reduce(packed)
    return tuple((packed / world).unbind())


def on_host(*scalars: Tensor | float) -> list[float]:
    """Return the scalars as agreed, as Python numbers: one read, for which an accelerator is waited for once."""
    agreed = agree(*scalars)
    tensors = [s for s in agreed if isinstance(s, Tensor)]
    if len(tensors) < 2:
        return [float(s) for s in agreed]
    if any(t.device != tensors[0].device for t in tensors):
        tensors = [t.to(tensors[0].device) for t in tensors]
    numbers = iter(torch.stack(tensors).tolist())
    return [next(numbers) if isinstance(s, Tensor) else s for s in agreed]
