"""Estimators without products: finite differences of gradients (DARTS) and of the lower loop (PZOBO, HOZOG)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from adaptive_bilevel.policies.validation import choice, count, positive

from ..evaluation.vectors import Vector, add, dot, scale, zeros_like
from .dense import flat, shaped
from .estimate import Estimate, Point
from .oracle import Oracle
from .sample import Sample

__all__ = ["DARTS", "HOZOG", "PZOBO"]

PROBES = ("random", "axes")


@final
@dataclass(frozen=True)
class DARTS:
    """One virtual lower step, its derivative by a central difference: Liu et al., 2019, arXiv 1806.09055, eq. (8).

    y' = y - b grad_y g(x, y), u = f_y(x, y'), e = radius / ||u||,
    h = f_x(x, y') - b (g_x(x, y + e u) - g_x(x, y - e u)) / (2 e).
    The error is that of one unrolled step, plus O(radius^2). Costs one gradient of f and three of g.

    Args:
        step: b > 0, the virtual step; that of the lower level.
        radius: Length of the probe, > 0.

    Raises:
        OptionError: An option is out of range.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> point = Point((torch.tensor([4.0]),), (torch.tensor([2.0]),))
    >>> DARTS(step=0.25)(oracle, point, Sample()).hypergradient
    (tensor([0.2500]),)
    """

    step: float
    radius: float = 0.01

    cost: ClassVar[str] = "1 gradient of f, 3 gradients of g, no product"
    needs_path: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the options."""
        positive("DARTS", "step", self.step, below_infinity=True)
        positive("DARTS", "radius", self.radius, below_infinity=True)

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate (its loss and partials are those at y')."""
        ahead = add(point.y, oracle.lower_gradients(point.x, point.y, sample).lower, -self.step)
        loss, partials = oracle.upper_gradients(point.x, ahead, sample)
        length = math.sqrt(dot(partials.lower, partials.lower))
        if not length > 0.0:
            return Estimate(partials.upper, None, loss)
        e = self.radius / length
        there, back = (
            oracle.lower_gradients(point.x, add(point.y, partials.lower, sign * e), sample, of="x").upper
            for sign in (1.0, -1.0)
        )
        return Estimate(add(partials.upper, add(there, back, -1.0), -self.step / (2.0 * e)), None, loss)


@dataclass(frozen=True)
class _Probing:
    """Options of the estimators that run the lower loop again at x + radius u.

    Args:
        directions: Number m of random probes.
        radius: mu > 0. If it is too small, the rounding of the dtype dominates.
        probes: "random", or "axes": all sqrt(d_x) e_j in the place of random ones, for small x and for tests.
    """

    directions: int = 1
    radius: float = 1e-3
    probes: str = "random"

    needs_path: ClassVar[bool] = True
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the options."""
        owner = type(self).__name__
        count(owner, "directions", self.directions)
        positive(owner, "radius", self.radius, below_infinity=True)
        choice(owner, "probes", self.probes, PROBES)

    def _draw(self, point: Point, sample: Sample, *, unit: bool) -> Iterator[Vector]:
        """Yield the probes u, with mean u u^T = I (of length sqrt(d_x) if `unit`: HOZOG's d_x u u^T)."""
        x = flat(point.x)
        if self.probes == "axes":
            for e in torch.eye(x.numel(), dtype=x.dtype, device=x.device):
                yield shaped(e * math.sqrt(x.numel()), point.x)
            return
        generator = sample.generator()
        for _ in range(self.directions):
            u = torch.randn(x.numel(), generator=generator, dtype=torch.float64)
            if unit:
                u = u * (math.sqrt(x.numel()) / u.norm())
            yield shaped(u.to(x), point.x)

    def _again(self, oracle: Oracle, point: Point, u: Vector) -> tuple[Vector, Vector]:
        """Return x + radius u, and where the same lower loop leads there."""
        x = add(point.x, u, self.radius)
        y = point.path[0].y if point.path else point.y
        for visit in point.path:
            y = add(y, oracle.lower_gradients(x, y, visit.sample).lower, -visit.step)
        return x, y


@final
@dataclass(frozen=True)
class PZOBO(_Probing):
    """h = f_x + (1/m) sum_j u_j <(y_T(x + mu u_j) - y_T(x)) / mu, f_y>: Sow et al., 2022, arXiv 2110.07004.

    The lower loop is run again, on the same samples, at m points. Costs one gradient of f and m T of g. The variance
    is large (it grows with d_x / m).

    Raises:
        OptionError: An option is out of range.

    >>> from adaptive_bilevel.hypergradient import descend
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x = (torch.tensor([4.0]),)
    >>> y, path = descend(oracle, x, (torch.tensor([0.0]),), 2, 0.25, Sample())
    >>> PZOBO(probes="axes")(oracle, Point(x, y, path=path), Sample()).hypergradient[0].round(decimals=2)
    tensor([0.1900])
    """

    cost: ClassVar[str] = "1 gradient of f; m gradients of g per lower step, no product"

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        total, drawn = zeros_like(point.x), 0
        for u in self._draw(point, sample, unit=False):
            _, y = self._again(oracle, point, u)
            total, drawn = add(total, u, dot(add(y, point.y, -1.0), partials.lower) / self.radius), drawn + 1
        return Estimate(add(partials.upper, total, 1.0 / drawn), None, loss, partials)


@final
@dataclass(frozen=True)
class HOZOG(_Probing):
    """h = (d_x / m) sum_j (F_T(x + mu u_j) - F_T(x)) / mu u_j, u on the unit sphere: Gu et al., 2021, arXiv 2102.09026.

    F_T(x) = f(x, y_T(x)): no gradient of f at all. Costs m + 1 values of f and m T gradients of g.

    Raises:
        OptionError: An option is out of range.

    >>> from adaptive_bilevel.hypergradient import descend
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x = (torch.tensor([4.0]),)
    >>> y, path = descend(oracle, x, (torch.tensor([0.0]),), 2, 0.25, Sample())
    >>> HOZOG(probes="axes")(oracle, Point(x, y, path=path), Sample()).hypergradient[0].round(decimals=2)
    tensor([0.1900])
    """

    cost: ClassVar[str] = "m + 1 values of f; m gradients of g per lower step, no product"

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss = oracle.upper_value(point.x, point.y, sample)
        total, drawn = zeros_like(point.x), 0
        for u in self._draw(point, sample, unit=True):
            x, y = self._again(oracle, point, u)
            change = float(oracle.upper_value(x, y, sample) - loss) / self.radius
            total, drawn = add(total, u, change), drawn + 1
        return Estimate(scale(total, 1.0 / drawn), None, loss)
