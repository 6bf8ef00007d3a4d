"""The Diagnosis role: what limits this run?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from ..optim.state import RoleState
from .context import Taken

__all__ = ["SlopeDiagnosis"]


@final
class SlopeDiagnosis:
    """Compares the slope of the searched function with what the hypergradient promised.

    A ratio s / <h, d> outside [1/2, 2] for 20 steps in a row is reported once. The state counts such steps, "far".
    """

    _STEPS = 20

    def init(self) -> RoleState:
        """Return a count of 0."""
        return RoleState({"far": 0})

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the message in the 20th such step."""
        if self._far(taken, state) != self._STEPS or not self._comparable(taken):
            return []
        return [
            f"for {self._STEPS} steps the searched function's slope was far from <hypergradient, direction> (ratio now "
            f"{taken.record.slope_ratio:.3g}): .grad and {taken.solver} disagree. Check the hypergradient with "
            "adaptive_bilevel.hypergradient.check, give BiSLS the solver that it uses, or solve further"
        ]

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return the count with this step in it."""
        return RoleState({"far": self._far(taken, state)})

    @staticmethod
    def _comparable(taken: Taken) -> bool:
        return taken.comparable and math.isfinite(taken.record.slope_ratio)

    def _far(self, taken: Taken, state: RoleState) -> int:
        far: int = state.shared["far"]
        if not self._comparable(taken):
            return far
        return far + 1 if not 0.5 <= taken.record.slope_ratio <= 2.0 else 0
