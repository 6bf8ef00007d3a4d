"""Oracle counts: all values, gradients, HVPs and JVPs of the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Counts", "Evaluations"]


@dataclass
class Counts:
    """Oracle calls of one level: values (forward passes), gradients (each includes its value), HVPs and JVPs."""

    values: int = 0
    gradients: int = 0
    hvps: int = 0
    jvps: int = 0

    @property
    def cost(self) -> float:
        """Cost in gradients: a value counts .35, an HVP 2.2, a JVP 1."""
        return self.gradients + 0.35 * self.values + 2.2 * self.hvps + self.jvps


@dataclass
class Evaluations:
    """Counts of both levels since construction. An optimizer without a level below counts as lower."""

    upper: Counts = field(default_factory=Counts)
    lower: Counts = field(default_factory=Counts)
