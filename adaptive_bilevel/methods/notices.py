"""What a run warns of, each once: steps that failed, and loops that reached their cap."""

from __future__ import annotations

from ..errors import warn
from ..policies import Outcome
from .row import NAMES

__all__ = ["Notices"]

REMEDIES = {
    Outcome.search_failed: "Its next search starts as the last one did; often the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give the policy a lower_bound= that the loss never falls below.",
    Outcome.no_descent: "Its direction does not descend on the sampled loss.",
}


class Notices:
    """The warnings of a run.

    Args:
        row: Name of the row.
    """

    def __init__(self, row: str) -> None:
        self._row = row
        self._told: set[object] = set()

    def outcome(self, variable: str, outcome: Outcome) -> None:
        """Warn of an outcome that training survives."""
        if outcome in REMEDIES and self._first((variable, outcome)):
            warn(
                f"methods.run({self._row!r}), step of {variable} ({NAMES[variable]}): {outcome.sentence}. "
                f"{REMEDIES[outcome]} (said once)"
            )

    def cap(self, group: str, steps: int, tolerance: float) -> None:
        """Warn that a loop ended by its number of steps."""
        if self._first("cap"):
            warn(
                f"methods.run({self._row!r}): {steps} steps of {group} did not bring its squared "
                f"gradient norm to tolerance={tolerance:.3g}; raise lower_steps= or auxiliary_steps=, or the "
                "tolerance (said once)"
            )

    def _first(self, notice: object) -> bool:
        if notice in self._told:
            return False
        self._told.add(notice)
        return True
