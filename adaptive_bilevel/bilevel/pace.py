"""The Pace role: is a search due?"""

from __future__ import annotations

from typing import final

from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from ..policies import Record
from .context import Point

__all__ = ["Always", "EveryStep"]


@final
class EveryStep:
    """A search in every step, except where no trial could tell anything.

    Where what the last step length promises is lost in the rounding of f, solves would be for slopes of either sign,
    and steps would grow or shrink by chance. The step is then as long as the last one that was searched.
    """

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, point: Point, path: SearchPath, state: RoleState) -> float | None:
        """Return the last step where the run has stalled, else None."""
        stalled = point.scale.stalled(path.promised, point.value, point.rounding)
        return point.scale.previous if stalled else None

    def commit(self, point: Point, record: Record, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class Always:
    """A search in every step, whatever it could tell: the paper's."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, point: Point, path: SearchPath, state: RoleState) -> float | None:
        """Return None."""
        return None

    def commit(self, point: Point, record: Record, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()
