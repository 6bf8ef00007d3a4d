"""Decay schedules: factors that turn a bound into a non-increasing sequence of bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import validation
from .scalars import Scalar

__all__ = ["DECAYS", "ESTIMATED", "Decay", "PowerDecay", "decay_factor"]

Decay = str | Callable[[Scalar], Scalar]

DECAYS: dict[str, Callable[[Scalar], Scalar]] = {
    "constant": lambda k: 1.0,
    "inverse_sqrt": lambda k: (k + 1) ** -0.5,
    "inverse_cbrt": lambda k: (k + 1) ** (-1.0 / 3.0),
    "inverse": lambda k: 1.0 / (k + 1),
}
"""Named schedules, k counted from 0: 1, 1/sqrt(k+1) (convex), 1/cbrt(k+1) (for averages), 1/(k+1) (strongly convex)."""

ESTIMATED = ("inverse_sqrt", "inverse_cbrt")
"""Schedules under which a bound that was not given is estimated at each step, see `policies.distance`."""


def decay_factor(decay: Decay, k: Scalar) -> Scalar:
    """Return the factor of step k. The first step has k = 0; named schedules then have the factor 1.

    Args:
        decay: A name, or a callable k -> factor.
        k: Number of steps before this one.

    >>> [decay_factor("inverse", k) for k in range(3)]
    [1.0, 0.5, 0.3333333333333333]
    """
    return DECAYS[decay](k) if isinstance(decay, str) else decay(k)


@dataclass(frozen=True)
class PowerDecay:
    """The schedule (k+1)^-exponent, e.g. of two-timescale methods: 3/5 for x and 2/5 for y in TTSA.

    Args:
        exponent: At or above 0.

    Raises:
        OptionError: An option is out of range.

    >>> round(PowerDecay(0.4)(31), 12)
    0.25
    """

    exponent: float

    def __post_init__(self) -> None:
        """Validate the exponent."""
        validation.non_negative("PowerDecay", "exponent", self.exponent)

    def __call__(self, k: Scalar) -> Scalar:
        """Return the factor of step k."""
        return (k + 1) ** -self.exponent
