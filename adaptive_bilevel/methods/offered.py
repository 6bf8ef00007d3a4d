"""Where the lower loop begins after an upper search that has moved y along to a prediction."""

from __future__ import annotations

from ..evaluation import foreach
from ..evaluation.vectors import Vector, inner
from ..hypergradient.estimate import Point
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..optim.warm_start import Parabola, Share, farther_end

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
    offset = foreach.sub(moved.y, stayed)

    def at(share: float) -> Vector:
        return moved.y if share == 1.0 else tuple(foreach.add(stayed, offset, alpha=share)) if share else stayed

    kept = share.value
    there = float(oracle.lower_value(moved.x, at(farther_end(kept)), sample))
    here = oracle.lower_gradients(moved.x, at(kept), sample)
    seen = share.after(Parabola.through(kept, float(here.loss), float(inner(here.lower, offset)), there))
    return moved._replace(y=at(kept if share.known else seen.value)), seen
