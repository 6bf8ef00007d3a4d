"""From tensors to the scalars that policies see: sums over all tensors of a level, and agreement between processes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

__all__ = ["agree", "inner", "on_cpu", "on_host", "on_host_with_inner"]


def inner(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return sum_i w_i <left_i, right_i> as a 0-dim tensor, accumulated in float32 at least."""
    if not left:
        return torch.zeros(())
    products = _products(left, right, weights)
    return products[0] if len(products) == 1 else _stacked(products).sum()


def on_host_with_inner(
    scalar: Tensor | float, left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return a scalar and an inner product as agreed, as Python numbers, by one read of all that they consist of."""
    if not left or _world_size() > 1:
        number, product = on_host(scalar, inner(left, right, weights))
        return number, product
    products = _products(left, right, weights)
    if not isinstance(scalar, Tensor):
        return scalar, sum(_stacked(products).tolist())
    *terms, number = _stacked([*products, scalar]).tolist()
    return number, sum(terms)


def _products(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    products = [_dot(a, b) for a, b in zip(left, right, strict=True)]
    if weights is not None and weights.count(1.0) < len(weights):
        products = [p if w == 1.0 else p * w for p, w in zip(products, weights, strict=True)]
    return products


_is_cpu = attrgetter("is_cpu")


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are on the CPU."""
    return all(map(_is_cpu, tensors))


def _stacked(scalars: list[Tensor]) -> Tensor:
    """Return the scalars as a vector, in the widest of their dtypes, on the device of the first."""
    return torch.stack(scalars if on_cpu(scalars) else [s.to(scalars[0].device) for s in scalars])


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
    numbers = iter(_stacked(tensors).tolist())
    return [next(numbers) if isinstance(s, Tensor) else s for s in agreed]
