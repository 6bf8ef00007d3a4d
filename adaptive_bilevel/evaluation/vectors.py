"""Arithmetic on lists of tensors seen as one long vector, accumulated in at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from . import foreach
from .parts import any_in_parts, part, whole

__all__ = [
    "SHORT",
    "Vector",
    "add",
    "cast_like",
    "dot",
    "fingerprint",
    "inner",
    "inners",
    "negate",
    "on_cpu",
    "products",
    "rounding",
    "scale",
    "stacked",
    "unmoved",
    "widen",
    "zeros_like",
]

Vector: TypeAlias = tuple[Tensor, ...]

SHORT = (torch.float16, torch.bfloat16)
"""Dtypes with too few digits for sums."""


def widen(tensors: Sequence[Tensor]) -> Vector:
    """Detach, and raise half precision to float32: a recursion of vectors in float16 loses its digits at once."""
    return tuple(t.detach().float() if t.dtype in SHORT else t.detach() for t in tensors)


def cast_like(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Vector:
    """Return ``tensors`` in the dtypes of ``like``."""
    return tuple(t.to(dtype=other.dtype) for t, other in zip(tensors, like, strict=True))


def inner(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return sum_i w_i <left_i, right_i> as a 0-dim tensor, accumulated in float32 at least."""
    return _total(products(left, right, weights))


def inners(*pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """Return `inner` of several pairs; of parts, by one exchange."""
    here = [_products(left, right) for left, right in pairs]
    terms = iter(whole([term for found in here for term in found], [t for left, _ in pairs for t in left]))
    return [_total([next(terms) for _ in found]) for found in here]


def _total(terms: list[Tensor]) -> Tensor:
    if not terms:
        return torch.zeros(())
    return terms[0] if len(terms) == 1 else stacked(terms).sum()


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return <left, right> as a number, for which an accelerator is waited for once."""
    return float(inner(left, right).detach())


def fingerprint(tensors: Sequence[Tensor]) -> float:
    """Return ||x||^2, by which nearly every change of x shows, however it was made (versions miss ``.data``)."""
    detached = [t.detach() for t in tensors]
    return dot(detached, detached)


def unmoved(at: float | None, tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are where their `fingerprint` was taken; of parts, by as many processes or by others."""
    now = fingerprint(tensors)
    return at == now or (at is not None and any_in_parts(tensors) and abs(at - now) <= 8.0 * rounding(tensors) * now)


def products(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    """Return the terms of `inner`, one for each pair of tensors."""
    found = whole(_products(left, right), left)
    if weights is not None and weights.count(1.0) < len(weights):
        found = [p if w == 1.0 else p * w for p, w in zip(found, weights, strict=True)]
    return found


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Return the terms of `inner` over the entries that this process holds."""
    return [_dot(part(a), part(b)) for a, b in zip(left, right, strict=True)]


_is_cpu = attrgetter("is_cpu")


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are on the CPU."""
    return all(map(_is_cpu, tensors))


def stacked(scalars: list[Tensor]) -> Tensor:
    """Return the scalars as a vector, in the widest of their dtypes, on the device of the first."""
    return torch.stack(scalars if on_cpu(scalars) else [s.to(scalars[0].device) for s in scalars])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 1:
        # Often both are the same gradient, and a view costs as much as a small product.
        a, b = (a.reshape(-1),) * 2 if a is b else (a.reshape(-1), b.reshape(-1))
    return torch.dot(a.float(), b.float()) if a.dtype in SHORT or b.dtype in SHORT else torch.dot(a, b)


def add(left: Sequence[Tensor], right: Sequence[Tensor], factor: float = 1.0) -> Vector:
    """Return ``left + factor * right``."""
    return tuple(foreach.add(left, right, alpha=factor))


def scale(tensors: Sequence[Tensor], factor: float) -> Vector:
    """Return ``factor * tensors``."""
    return tuple(foreach.mul(tensors, factor))


def negate(tensors: Sequence[Tensor]) -> Vector:
    """Return ``-tensors``."""
    return tuple(foreach.neg(tensors))


def zeros_like(tensors: Sequence[Tensor]) -> Vector:
    """Return zeros of the shapes of ``tensors``, detached."""
    return tuple(torch.zeros_like(t, requires_grad=False) for t in tensors)


def rounding(tensors: Sequence[Tensor]) -> float:
    """Return the largest machine epsilon among the dtypes of ``tensors``."""
    return max(torch.finfo(t.dtype).eps for t in tensors)
