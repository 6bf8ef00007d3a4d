"""The path of a step: x - a d, and its shortening by a projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.reductions import agree
from ..evaluation.vectors import inner
from .direction import Descent, Gradient
from .projection import Box, Section

__all__ = ["SearchPath", "scaled"]

_KEPT = 0.5
"""A direction that keeps this share of its slope in the convex set is searched; else that of -h may be."""


def scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Return each tensor times its factor."""
    return [t if w == 1.0 else t * w for t, w in zip(tensors, factors, strict=True)]


@dataclass
class SearchPath:
    """x - a d, along which a step size a is searched.

    Attributes:
        gradient: The tensors of x that have a (hyper)gradient h, with h and their factors of a step.
        along: d, the direction searched along; the factors are in it.
        descent: The direction that d comes from; it moves the tensors.
        constrained: All tensors of x, if there is a convex set for them, and the projection to it.
        longest: No step above it stays in that set.
        cut: Whether the set has shortened d.
        replaced: Whether d is not A^{-1} h: it is that of -h, for the set's sake, or one that was given.
        rounding: Of a path that was cut: how much of <h, x - P(x - a d)> may be rounding.
        promised: <h, d>, the slope that the (hyper)gradient promises.
    """

    gradient: Gradient
    along: list[Tensor]
    descent: Descent
    constrained: tuple[Sequence[Tensor], Section] | None = None
    longest: float = math.inf
    cut: bool = False
    replaced: bool = False
    rounding: float = 0.0
    promised: float = field(init=False)

    def __post_init__(self) -> None:
        """Compute the slope."""
        self.promised = float(agree(inner(self.gradient.values, self.along))[0])

    def take(self, step: float, along: Callable[[], list[Tensor]] | None) -> None:
        """Move the tensors, which are at x, along another direction; d is dropped before it is computed.

        Args:
            step: The step size.
            along: Computes that direction, without the factors; None: d.
        """
        if along is not None:
            self.along = []
            self.along = scaled(along(), self.gradient.factors)
        elif not self.along:
            self.along = scaled(self.descent.precondition(self.gradient.values), self.gradient.factors)
        self.go(step)

    def rest(self) -> None:
        """Drop d, where `take` can compute it again."""
        if not (self.cut or self.replaced):
            self.along = []

    def go(self, step: float) -> None:
        """Move the tensors, which are at x, along d."""
        self.descent.move(self.gradient.tensors, self.along, step, [1.0] * len(self.along))
        if self.constrained is not None:
            # For d this changes rounding errors only.
            params, project = self.constrained
            project(params)

    def release(self) -> None:
        """Drop the directions: the step is taken."""
        self.along, self.descent = [], Descent(list)

    def within(self, params: Sequence[Tensor], project: Section, longest: float) -> SearchPath:
        """Return the path along (x - P(x - a d)) / a for the longest step a to be tried.

        Steps up to a along it stay in the convex set, so the tangent is needed for one direction only, and the test of
        sufficient decrease is that of the projected displacement. The parameters are not touched.

        If less than half of <h, d> is left of it, -h (times the factors), scaled to the same <h, d>, is projected too,
        and the path that promises more is taken: a projection is the nearest point in the norm it was made for, so
        along d = A^{-1} h it may not descend at all, or stop at points that are no minimizers. A box is nearest in
        every diagonal metric.
        """
        constrained, longest = (params, project), min(longest, self._representable())
        along = self._cut(self.along, constrained, longest)
        if along is None:
            # Nothing was cut: the steps up to here are those without a set, in their roundings too.
            return replace(self, constrained=constrained, longest=longest)
        rounding = self._rounding(along)
        path = replace(self, along=along, constrained=constrained, longest=longest, cut=True, rounding=rounding)
        h = self.gradient.values
        settled = self.replaced or all(d is g for d, g in zip(self.along, h, strict=True))
        if settled or path.keeps(self) or isinstance(project.project, Box):
            return path
        weighted = [g * w for g, w in zip(h, self.gradient.factors, strict=True)]
        square = float(agree(inner(h, weighted))[0])
        other = self._cut(foreach.mul(weighted, self.promised / square), constrained, longest) if square else None
        return path if other is None else max(path, replace(path, along=other, replaced=True), key=_promised)

    def keeps(self, before: SearchPath) -> bool:
        """Return whether the set has left half of the slope of the path before."""
        return self.promised >= _KEPT * before.promised

    def _representable(self) -> float:
        """Return the longest step of which entries are finite, and their squares' sum in a dtype wide enough for it."""
        along = [d for d in self.along if d.numel()]
        sizes = [float(size) for size in torch._foreach_norm(along, math.inf)] if along else []
        count, most = sum(d.numel() for d in along), math.inf
        for d, size in zip(along, sizes, strict=True):
            own, wide = torch.finfo(d.dtype).max, torch.finfo(torch.promote_types(d.dtype, torch.float32)).max
            if size > 0.0 and math.isfinite(size):
                most = min(most, own, min(own / 4.0, math.sqrt(wide / count)) / size)
        return most

    def _rounding(self, along: Sequence[Tensor]) -> float:
        """Return how much of <h, x - P(x - a d)> may be rounding.

        Both points have some four roundings (of the move, a norm or a sum, a quotient and a product), of half a unit.
        """
        sums = [
            4.0 * torch.finfo(x.dtype).eps * float(inner([h.abs() * (d != 0)], [x.detach().abs()]))
            for x, h, d in zip(self.gradient.tensors, self.gradient.values, along, strict=True)
        ]
        return float(agree(sum(sums))[0])

    def _cut(
        self, along: Sequence[Tensor], constrained: tuple[Sequence[Tensor], Section], longest: float
    ) -> list[Tensor] | None:
        """Return (x - P(x - a d)) / a; None if x - a d is in the set."""
        params, project = constrained
        copies = {id(p): p.detach().clone() for p in params}
        moved = [copies[id(p)] for p in self.gradient.tensors]
        self.descent.move(moved, along, longest, [1.0] * len(moved))
        outside = {name: t.clone() for name, t in copies.items()}
        project(list(copies.values()))
        if all(torch.equal(t, outside[name]) for name, t in copies.items()):
            return None
        return [(p - q) / longest for p, q in zip(self.gradient.tensors, moved, strict=True)]


def _promised(path: SearchPath) -> float:
    return path.promised
