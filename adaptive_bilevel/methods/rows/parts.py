"""What rows of several families share."""

from __future__ import annotations

from dataclasses import dataclass

from ...hypergradient import Implicit, Neumann
from ...policies import Constant, PowerDecay

__all__ = ["RANDOM", "STEP", "STRONG", "SUM", "OldWeight", "decaying"]

STRONG = "g strongly convex in y; Lipschitz gradients and Hessians"
STEP = Constant(bound=0.1)
SUM = Implicit(Neumann(steps=10, scale=0.1))
RANDOM = Implicit(Neumann(steps=10, scale=0.1, random=True))


def decaying(exponent: float, bound: float = 0.1) -> Constant:
    """Return the step bound (k+1)^-exponent."""
    return Constant(bound=bound, decay=PowerDecay(exponent))


@dataclass(frozen=True)
class OldWeight:
    """1 - c (k+1)^-exponent, the weight of the old direction in STORM."""

    exponent: float
    c: float = 1.0

    def __call__(self, k: int) -> float:
        """Return the weight of iteration k."""
        return max(0.0, 1.0 - self.c * float((k + 1) ** -self.exponent))
