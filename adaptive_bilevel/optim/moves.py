"""A move of the upper variable, and its shortening by a projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .direction import move
from .projection import Projection
from .scalars import agree, inner

__all__ = ["Move"]


@dataclass
class Move:
    """A move of the upper variable: x - a d in trials, x - a e in the end.

    Attributes:
        tensors: The upper tensors that have a hypergradient.
        gradient: h, the hypergradient.
        along: d, the direction searched along.
        stepped: e, the direction stepped along; None: d.
        constrained: The upper tensors, if there is a convex set for them, and the projection to it.
        longest: No step above it stays in that set.
        mover: Moves tensors along directions, see `Descent`.
        promised: <h, d>, the slope that the hypergradient promises.
    """

    tensors: list[Tensor]
    gradient: list[Tensor]
    along: list[Tensor]
    stepped: list[Tensor] | None
    constrained: tuple[Sequence[Tensor], Projection] | None = None
    longest: float = math.inf
    mover: Callable[[Sequence[Tensor], Sequence[Tensor], float, Sequence[float]], None] = move
    promised: float = field(init=False)

    def __post_init__(self) -> None:
        """Compute the slope."""
        self.promised = float(agree(inner(self.gradient, self.along))[0])

    def go(self, step: float, *, finally_: bool = False) -> None:
        """Move the tensors, which are at x."""
        along = self.stepped if finally_ and self.stepped is not None else self.along
        self.mover(self.tensors, along, step, [1.0] * len(along))
        if self.constrained is not None:
            # For d this changes rounding errors only.
            params, project = self.constrained
            project(params)

    def within(self, params: Sequence[Tensor], project: Projection, longest: float) -> Move:
        """Return the move along (x - P(x - a d)) / a for the longest step a to be tried.

        Steps up to a along it stay in the convex set, so the tangent is needed for one direction only, and the test of
        sufficient decrease is that of the projected displacement. The parameters are not touched.
        """
        copies = {id(p): p.detach().clone() for p in params}
        moved = [copies[id(p)] for p in self.tensors]
        self.mover(moved, self.along, longest, [1.0] * len(moved))
        outside = [t.clone() for t in copies.values()]
        project(list(copies.values()))
        if all(torch.equal(p, q) for p, q in zip(copies.values(), outside, strict=True)):
            # Nothing was cut: the steps up to here are those without a set, in their roundings too.
            return replace(self, constrained=(params, project), longest=longest)
        along = [(p - q) / longest for p, q in zip(self.tensors, moved, strict=True)]
        return replace(self, along=along, constrained=(params, project), longest=longest)
