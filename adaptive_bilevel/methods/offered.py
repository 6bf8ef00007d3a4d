"""The choice about a predicted y, before the lower loop after an upper search that has moved y along."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..evaluation.vectors import Vector
from ..hypergradient.estimate import Point
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample

__all__ = ["choose"]


def choose(oracle: Oracle, moved: Point, stayed: Vector, sample: Sample, next_step: Callable[[Point], Vector]) -> Point:
    """Return the point to go on from, as a lower optimizer chooses between warm start and prediction.

    The prediction has to be better than y, and than y after one more lower step of the last size.

    Args:
        oracle: Gives the lower loss.
        moved: Where y was moved along.
        stayed: y as it was before.
        sample: The sample of the next lower step.
        next_step: Point -> y after one more lower step from there.
    """
    stay = moved._replace(y=stayed)
    here, there = (float(oracle.lower_value(moved.x, point.y, sample)) for point in (moved, stay))
    if here < there:
        there = float(oracle.lower_value(moved.x, next_step(stay), sample))
    return stay if there <= here or math.isnan(here) else moved
