"""Where the last step has left the parameters, by which `AutoSLS` detects lower loops that start anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..evaluation.vectors import fingerprint, unmoved
from .state import RoleState, write_states

__all__ = ["Place"]

_ENTRY = "place"


class Place(NamedTuple):
    """Where the last step has left the parameters, while samples agree.

    The loss of a step is compared with that of the step before. Where a lower loop starts anew in between (a cold
    start, the next task of a meta-batch), the two losses belong to different points, and are not compared. It shows by
    parameters that other code has moved since the last step. A projection after each step moves them, too: only the
    first of such moves in successive steps is taken for a cold start.

    Attributes:
        at: The fingerprint of the parameters; None before the first step.
        moved: Whether other code had moved them before that step.
    """

    at: float | None = None
    moved: bool = False

    @classmethod
    def read(cls, state: Any) -> Place:
        """Return what the state of an optimizer holds."""
        return cls(**state.get(_ENTRY, {}))

    def left(self, params: Sequence[Tensor]) -> bool:
        """Return whether other code has moved the parameters since."""
        return self.at is not None and not unmoved(self.at, params)

    @staticmethod
    def keep(state: Any, params: Sequence[Tensor], moved: bool) -> None:
        """Write where a step leaves the parameters, and whether they were moved before it."""
        write_states(state, {_ENTRY: RoleState({"at": fingerprint(params), "moved": moved})}, params)
