"""The roles of an upper step: a protocol for each, and what it is given.

A role answers one question of the step. ``init()`` gives its state before the first step, ``propose(context, state)``
its answer, and ``commit(context, answer, state)`` what is new in the state after the step. The state is a `RoleState`
of plain numbers and tensors, an entry of its own in the optimizer's state. A role sees the context, never the
optimizer. ``commit`` is not called for a step that must leave no trace, and all states are written at once, after the
last role has committed.

The Direction role (along what) is that of the lower optimizers, too: `adaptive_bilevel.optim.direction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from ..policies import Record
from .context import Change, Mix, MomentumContext, PaceContext, Place, Point, PredictionContext, Redirect, Taken

__all__ = [
    "Diagnosis",
    "ModelCheck",
    "Momentum",
    "Pace",
    "Prediction",
    "Response",
    "ResponseModel",
    "StepCheck",
]


class ResponseModel(Protocol):
    """The searched function's lower part: how y answers along one path.

    Attributes:
        path: The path that it is for.
        slope: s, where -s is the slope at 0 of phi(a) = f(x - a d, y(a)).
        slope_ratio: s / <h, d> for the user's hypergradient h and its direction.
        comparable: Whether a ratio far from 1 says that h is wrong.
        offsets: w, how y answers to one unit of the step; None: not known.
    """

    path: SearchPath
    slope: float
    slope_ratio: float
    comparable: bool
    offsets: Sequence[Tensor] | None

    def close(self) -> None:
        """Drop what trials do not need: parameters are about to move."""
        ...

    def answer(self, step: float) -> None:
        """Put the lower variable to y(step), the upper one being at x - step d."""
        ...

    def changes(self) -> list[Change]:
        """Return how the lower gradients at the candidate in place differ from those at (x, y); [] if not known."""
        ...

    def correction(self) -> float | None:
        """Return what the last changes mean for f, to first order; None if not known."""
        ...


class Response(Protocol):
    """How does y answer to a move of x?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, point: Point, path: SearchPath, redirect: Redirect, state: RoleState) -> ResponseModel:
        """Return the model of y along the path, or along a path that `redirect` gives in its place."""
        ...

    def commit(self, point: Point, model: ResponseModel, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class StepCheck(Protocol):
    """The check of one search; called for candidates that passed the test of sufficient decrease."""

    def __call__(self, step: float, surplus: float, model: ResponseModel, place: Place) -> bool:
        """Return whether the model of y holds at this step.

        Args:
            step: The step of the candidate, which is in place; another one may be afterwards.
            surplus: How far its value is below what the search asks for.
            model: The response.
            place: Puts another candidate there.
        """
        ...


class ModelCheck(Protocol):
    """How far does the model of y hold?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, point: Point, state: RoleState) -> StepCheck:
        """Return the check for this step's search."""
        ...

    def commit(self, point: Point, check: StepCheck, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Pace(Protocol):
    """Is a search due?

    Attributes:
        keeps: Whether it keeps lengths while f still tells them apart.
    """

    keeps: bool

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def due(self, context: PaceContext, state: RoleState) -> bool:
        """Return whether a search is due whatever f is; the step then takes f with its gradients at once."""
        ...

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        """Return the step to take without a search, or None if a search is due."""
        ...

    def regrets(self, context: PaceContext, state: RoleState) -> Sequence[Tensor] | None:
        """Return x before the last step, if that was kept and f shows that it must be undone; else None."""
        ...

    def commit(self, context: PaceContext, record: Record, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Momentum(Protocol):
    """What is stepped along?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        """Return what is stepped along."""
        ...

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Prediction(Protocol):
    """Does y move along?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, context: PredictionContext, state: RoleState) -> list[Tensor] | None:
        """Return how y answers to one unit of the step that is taken; None: y stays."""
        ...

    def deliver(self, context: PredictionContext, response: Sequence[Tensor], step: float) -> None:
        """Move y by step * response, as this prediction does."""
        ...

    def commit(self, context: PredictionContext, response: Sequence[Tensor] | None, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Diagnosis(Protocol):
    """What limits this run?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return what should be said, as warnings."""
        ...

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...
