"""Where the lower loop begins after an upper search that has moved y along to a prediction."""

from __future__ import annotations

from ..evaluation import foreach
from ..evaluation.vectors import Vector, inner
from ..hypergradient.estimate import Point
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..optim.warm_start import Share

__all__ = ["choose"]


def choose(oracle: Oracle, moved: Point, stayed: Vector, sample: Sample, share: Share) -> tuple[Point, Share]:
    """Return the point to go on from, and the share with this prediction in it, as a lower optimizer finds them.

    Args:
        oracle: Gives the lower loss.
        moved: Where y was moved along.
        stayed: y as it was before.
        sample: The sample of the next lower step.
        share: How much of the predictions before was kept.
    """
    here = float(oracle.lower_value(moved.x, moved.y, sample))
    there = oracle.lower_gradients(moved.x, stayed, sample)
    offset = foreach.sub(moved.y, stayed)
    seen = share.after(float(inner(there.lower, offset)), float(there.loss), here)
    if seen.value == 1.0:
        return moved, seen
    return moved._replace(y=tuple(foreach.add(stayed, offset, alpha=seen.value))), seen
