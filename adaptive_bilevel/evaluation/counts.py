"""Oracle counts: all values, gradients, HVPs and JVPs of the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Counts", "Evaluations"]


@dataclass
class Counts:
    """Oracle calls of one level: values (forward passes), gradients (each includes its value), HVPs and JVPs.

    Attributes:
        values: Forward passes.
        gradients: Backward passes, each with its value.
        hvps: Products with the Hessian of the lower loss.
        jvps: Products with its mixed second derivatives.

    >>> Counts(values=2, gradients=1, hvps=3).cost
    8.3
    """

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
    """Counts of both levels since construction. An optimizer without a level below counts as lower.

    Attributes:
        upper: Calls of the upper level.
        lower: Calls of the lower level.

    >>> import torch
    >>> from adaptive_bilevel import SLS
    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = SLS([x])
    >>> _ = optimizer.step(lambda: (x**2).sum())
    >>> optimizer.evaluations.lower.gradients
    1
    """

    upper: Counts = field(default_factory=Counts)
    lower: Counts = field(default_factory=Counts)
