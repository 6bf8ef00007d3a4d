"""The scalars that policies see: read from the device once, and the same on all processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import processes
from .vectors import inner, products, stacked

__all__ = ["agree", "agreed", "on_host", "on_host_with_inner"]


def on_host_with_inner(
    scalar: Tensor | float, left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return a scalar and an inner product as agreed, as Python numbers, by one read of all that they consist of."""
    if not left or processes.count() > 1:
        number, product = on_host(scalar, inner(left, right, weights))
        return number, product
    terms = products(left, right, weights)
    if not isinstance(scalar, Tensor):
        return scalar, sum(stacked(terms).tolist())
    *parts, number = stacked([*terms, scalar]).tolist()
    return number, sum(parts)


def agree(*scalars: Tensor | float) -> tuple[Tensor | float, ...]:
    """Return the scalars, averaged over the processes, so that every rank decides alike."""
    count = processes.count()
    if count == 1:
        return scalars
    return tuple((processes.summed(processes.packed(scalars)) / count).unbind())


def agreed(loss: Tensor) -> Tensor:
    """Return a loss as agreed, detached, in its dtype."""
    (mean,) = agree(loss.detach())
    return mean.to(loss.dtype) if isinstance(mean, Tensor) else loss.detach()


def on_host(*scalars: Tensor | float) -> list[float]:
    """Return the scalars as agreed, as Python numbers: one read, for which an accelerator is waited for once."""
    agreed = agree(*scalars)
    tensors = [s for s in agreed if isinstance(s, Tensor)]
    if len(tensors) < 2:
        return [float(s) for s in agreed]
    numbers = iter(stacked(tensors).tolist())
    return [next(numbers) if isinstance(s, Tensor) else s for s in agreed]
