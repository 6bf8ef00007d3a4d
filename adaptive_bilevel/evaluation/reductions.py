"""The scalars that policies see: read from the device once, and the same on all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .vectors import inner, products, stacked

__all__ = ["agree", "on_host", "on_host_with_inner"]


def on_host_with_inner(
    scalar: Tensor | float, left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return a scalar and an inner product as agreed, as Python numbers, by one read of all that they consist of."""
    if not left or _world_size() > 1:
        number, product = on_host(scalar, inner(left, right, weights))
        return number, product
    terms = products(left, right, weights)
    if not isinstance(scalar, Tensor):
        return scalar, sum(stacked(terms).tolist())
    *parts, number = stacked([*terms, scalar]).tolist()
    return number, sum(parts)


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
    numbers = iter(stacked(tensors).tolist())
    return [next(numbers) if isinstance(s, Tensor) else s for s in agreed]
