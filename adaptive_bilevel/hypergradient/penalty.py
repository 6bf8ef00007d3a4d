"""First-order estimators through the value function v(x) = min_z g(x, z): F2SA, V-PBGD, BOME, primal-dual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..evaluation.vectors import add, scale
from .estimate import Estimate, Point
from .oracle import Oracle
from .sample import Sample

__all__ = ["ValueFunction"]


@final
@dataclass(frozen=True)
class ValueFunction:
    """h = f_x(x, y) + lambda (g_x(x, y) - g_x(x, z)), z near argmin g(x, .): Kwon et al., 2023, arXiv 2301.10945.

    With y the minimizer of f + lambda g, h is grad F up to O(1 / lambda). `Point.multiplier` is lambda, `Point.z` is z.
    Costs one gradient of f and two of g, no product.

    Args:
        normalise: Scale h by min(1 / lambda, 1), so that one step size serves all lambda (V-PBGD).

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y, z = ((torch.tensor([entry]),) for entry in (4.0, 1.95, 2.0))
    >>> ValueFunction()(oracle, Point(x, y, z=z, multiplier=10.0), Sample()).hypergradient[0].round(decimals=2)
    tensor([0.5000])
    """

    normalise: bool = False

    cost: ClassVar[str] = "1 gradient of f, 2 gradients of g, no product"
    needs_path: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        here = oracle.lower_gradients(point.x, point.y, sample, of="xy")
        there = oracle.lower_gradients(point.x, point.z, sample, of="x")
        h = add(partials.upper, add(here.upper, there.upper, -1.0), point.multiplier)
        return Estimate(scale(h, self.scaling(point.multiplier)), None, loss, partials)

    def scaling(self, multiplier: float) -> float:
        """Return the factor of the objective f + lambda g."""
        return 1.0 / max(multiplier, 1.0) if self.normalise else 1.0
