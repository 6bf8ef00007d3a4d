"""Whether a slope can be one of rounding errors: that depends on the sizes of x and d, which a policy does not see."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner, rounding
from ..policies.armijo import LARGEST_RATIO
from ..policies.scalars import largest_quotient

__all__ = ["most_ratio"]


def most_ratio(
    loss: float,
    slope: float,
    tensors: Sequence[Tensor],
    along: Sequence[Tensor],
    weights: Sequence[float] | None = None,
) -> float:
    """Return the largest |f| / <g, d> that rounding errors of g do not explain.

    Rounding of f leaves a gradient of size u |f| / |x|, u a few units of the dtype, and |f| / <g, d> = |x| / (u |d|)
    along it. This bound has the unit of a step: it changes as |f| / <g, d> does where f or x is multiplied by a number.
    The norms are taken only where that ratio is above 2^100, which is the bound for f, x of size 1, and the least that
    is returned. An x of zeros gives no size, so it is 2^100 there.

    Args:
        loss: f.
        slope: <g, d>.
        tensors: x.
        along: d.
        weights: Factors of d.
    """
    if not (slope > 0.0 and math.isfinite(loss) and abs(loss) / LARGEST_RATIO >= slope):
        return LARGEST_RATIO
    x = [p.detach() for p in tensors]
    moved = list(along) if weights is None else [d * w for d, w in zip(along, weights, strict=True)]
    size, length = (math.sqrt(max(square, 0.0)) for square in on_host(inner(x, x), inner(moved, moved)))
    if not (0.0 < size < math.inf and 0.0 < length < math.inf):
        return LARGEST_RATIO
    return min(max(size / length * (0.25 / rounding(x)), LARGEST_RATIO), largest_quotient(loss))
