"""How much of a predicted move of y is kept: the share that the predictions before were worth.

An upper step moves y by gamma p, where p = a w is how the response expects the solution to answer. The tangent of a
minibatch says how y answers if the batch were the whole problem, and the whole answers by the batch's part of it. So

    gamma = clip(-S / (2 Q), 0, 1),    S = sum of s,    Q = sum of q,

is the minimizer of the mean of g(y) + gamma s + gamma^2 q along the predictions so far, in units of |s| + |q|. Both
sums decay. Before anything is known, gamma is 1.

The parabola of a prediction is known at the next upper step, on its lower sample and after the lower loop, which has
taken y to y'. Along p, y' is at

    t = gamma + <y' - y - gamma p, p> / ||p||^2.

The slope there, s + 2 t q, is <grad_y g(y'), p>, and 2 q is p^T P^{-1} p, by the Rayleigh quotient <w, C^T d> / <w, w>
of the response. (P is positive definite, the Hessian of a network is not.) The minimizer, t - slope / (2 q), is where
the loop has taken y, and how far it has still to go. So this needs no evaluation, only a copy of p, and it works with
every lower optimizer and every loop.

``examples/benchmarks/NOTES.md`` has the figures, and what lost ("The share of a prediction").
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Parabola", "Share"]

_MEMORY = 0.9
"""Decay of the two sums, that of the mean of hypergradients."""


class Parabola(NamedTuple):
    """gamma s + gamma^2 q, the change of g along a prediction.

    Attributes:
        slope: s.
        bend: q.
    """

    slope: float
    bend: float

    @classmethod
    def at(cls, share: float, slope: float, curvature: float) -> Parabola:
        """Return the one with this slope at a share.

        Args:
            share: t.
            slope: s + 2 t q.
            curvature: 2 q.
        """
        return cls(slope - share * curvature, 0.5 * curvature)


class Share(NamedTuple):
    """What the predictions so far have shown.

    Attributes:
        slope: S.
        bend: Q.
    """

    slope: float = 0.0
    bend: float = 0.0

    @property
    def value(self) -> float:
        """gamma, in [0, 1]."""
        if self.bend <= 0.0:
            return float(self.slope <= 0.0)
        return min(max(-0.5 * self.slope / self.bend, 0.0), 1.0)

    def after(self, parabola: Parabola) -> Share:
        """Return the share with the parabola of a further prediction in it, unless it is not finite."""
        slope, bend = parabola
        size = abs(slope) + abs(bend)
        if not 0.0 < size < math.inf:
            return self
        return Share(_MEMORY * self.slope + slope / size, _MEMORY * self.bend + bend / size)
