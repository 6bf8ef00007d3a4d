"""Arithmetic on lists of tensors seen as one long vector, accumulated in at least float32."""

# torch._foreach_* has no public name, and torch.optim itself is built on it.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Vector", "add", "cast_like", "inner", "negate", "rounding", "scale", "widen", "zeros_like"]

Vector: TypeAlias = tuple[Tensor, ...]


def widen(tensors: Sequence[Tensor]) -> Vector:
    """Detach, and raise half precision to float32: a recursion of vectors in float16 loses its digits at once."""
    return tuple(t.detach().float() if t.dtype in (torch.float16, torch.bfloat16) else t.detach() for t in tensors)


def cast_like(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Vector:
    """Return ``tensors`` in the dtypes of ``like``."""
    return tuple(t.to(dtype=other.dtype) for t, other in zip(tensors, like, strict=True))


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return <left, right> over all tensors as a number; waits for the device once."""
    products = [
        torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(widen(left), widen(right), strict=True) if a.numel()
    ]
    if not products:
        return 0.0
    return float(torch.stack([product.to(products[0].device) for product in products]).sum())


def add(left: Sequence[Tensor], right: Sequence[Tensor], factor: float = 1.0) -> Vector:
    """Return ``left + factor * right``."""
    return tuple(torch._foreach_add(list(left), list(right), alpha=factor))


def scale(tensors: Sequence[Tensor], factor: float) -> Vector:
    """Return ``factor * tensors``."""
    return tuple(torch._foreach_mul(list(tensors), factor))


def negate(tensors: Sequence[Tensor]) -> Vector:
    """Return ``-tensors``."""
    return tuple(torch._foreach_neg(list(tensors)))


def zeros_like(tensors: Sequence[Tensor]) -> Vector:
    """Return zeros of the shapes of ``tensors``, detached."""
    return tuple(torch.zeros_like(t, requires_grad=False) for t in tensors)


def rounding(tensors: Sequence[Tensor]) -> float:
    """Return the largest machine epsilon among the dtypes of ``tensors``."""
    return max(torch.finfo(t.dtype).eps for t in tensors)
