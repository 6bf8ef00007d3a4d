"""Changes of lower gradients along a response, for the model check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.reductions import agree
from ..evaluation.vectors import inners
from .context import Change

__all__ = ["change_between", "effect_between", "unanswered"]


@contextmanager
def unanswered(tensors: Sequence[Tensor], offsets: Sequence[Tensor], step: float) -> Iterator[None]:
    """Take back step * offsets within the context."""
    foreach.add_(tensors, offsets, alpha=-step)
    yield
    foreach.add_(tensors, offsets, alpha=step)


def effect_between(old: Sequence[Tensor], new: Sequence[Tensor], push: Sequence[Tensor], step: float) -> Change:
    """Return the difference between a lower gradient where x has moved alone and old - step * push."""
    return change_between(old, new, push, 0.0, foreach.sub(old, list(push), alpha=step))


def change_between(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    push: Sequence[Tensor],
    residual: float,
    expected: Sequence[Tensor] | None = None,
) -> Change:
    """Return the change from one lower gradient, or from what is expected in its place, to another."""
    delta = foreach.sub(new, list(old if expected is None else expected))
    *squares, mixed = torch.stack(inners((new, new), (old, old), (delta, delta), (push, push), (delta, push))).tolist()
    after, before, change, pushed = (math.sqrt(square) if square > 0.0 else max(square, 0.0) for square in squares)
    along = abs(mixed) / pushed if pushed > 0.0 else 0.0
    rounding = 8.0 * max(torch.finfo(g.dtype).eps for g in old) * (after + before)
    size, pushed, before, along = (float(v) for v in agree(change, pushed, before, along))
    return Change(size, pushed, residual, rounding, before, along)
