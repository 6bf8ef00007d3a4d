"""From tensors to the scalars that policies see: sums over all tensors of a level, and agreement between processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["agree", "inner", "loss_resolution"]


def inner(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return sum_i w_i <left_i, right_i> as a 0-dim tensor, accumulated in float32 at least."""
    total: Tensor | None = None
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        product = torch.dot(a.reshape(-1), b.reshape(-1))
        if weights is not None and weights[i] != 1.0:
            product = product * weights[i]
        if total is None:
            total = product
        else:
            wide = torch.promote_types(total.dtype, product.dtype)
            total = total.to(wide) + product.to(device=total.device, dtype=wide)
    return torch.zeros(()) if total is None else total


def loss_resolution(loss: Tensor | float) -> float:
    """Return the relative rounding unit of the loss's dtype."""
    return torch.finfo(loss.dtype).eps if isinstance(loss, Tensor) else 2.220446049250313e-16


def agree(*scalars: Tensor | float) -> tuple[Tensor | float, ...]:
    """Return the scalars, averaged over all processes under torch.distributed, so that every rank decides alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return scalars
    world = torch.distributed.get_world_size()
    if world == 1:
        return scalars
    device = next((s.device for s in scalars if isinstance(s, Tensor)), torch.device("cpu"))
    packed = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device).reshape(()) for s in scalars])
    torch.distributed.all_reduce(packed)
    return tuple((packed / world).unbind())
