"""The roles of an upper step, a protocol for each.

``init()`` returns the state before the first step, ``propose(context, state)`` the role's answer, and
``commit(context, answer, state)`` the changes of the state after the step. The state is a `RoleState` of plain numbers
and tensors, with an entry of its own in the optimizer's state. A role receives the context, not the optimizer. A step
that leaves no trace does not call ``commit``. All states are written together, after the last role has committed.

The Direction role is shared with the lower optimizers: `adaptive_bilevel.optim.direction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from ..policies import Record
from .context import (
    Change,
    Mix,
    MomentumContext,
    PaceContext,
    Place,
    Point,
    PredictedMove,
    PredictionContext,
    Redirect,
    Taken,
)
from .share import Share

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
    """Model of y along one search path.

    Attributes:
        path: The path.
        slope: s, where -s is the slope at 0 of phi(a) = f(x - a d, y(a)).
        slope_ratio: s / <h, d> for the user's hypergradient h and its direction.
        comparable: Whether a ratio far from 1 means that h is wrong.
        offsets: w, the response of y to one unit of the step, or None if it is not known.

    A response may also have ``lower_gradient``, grad_y g at (x, y) after `close`, and ``curvature``, the Rayleigh
    quotient <w, C^T d> / <w, w>, both for the Prediction role.
    """

    path: SearchPath
    slope: float
    slope_ratio: float
    comparable: bool
    offsets: Sequence[Tensor] | None

    def close(self) -> None:
        """Drop what trials do not need. Called before parameters move."""
        ...

    def answer(self, step: float) -> None:
        """Move the lower variable to y(step). The upper one is at x - step d."""
        ...

    def changes(self) -> list[Change]:
        """Return the changes of the lower gradients from (x, y) to the candidate; [] if they are not known."""
        ...

    def confirm(self, place: Place) -> None:
        """Make sure that the model is that of the present lower loss, where a candidate's changes are too large.

        Args:
            place: Moves the parameters to a candidate. They are at the one of the last `answer` before and after.

        Raises:
            LowerLossChanged: It is not. The parameters are at (x, y), and the step begins again with another model.
        """
        ...

    def effects(self) -> list[Change]:
        """Return what the linear model ignores in the effect of x on the lower gradients at the candidate.

        That is, the differences between grad_y g(x - step d, y) and grad_y g(x, y) - step C^T d: y does not move.
        """
        ...

    def correction(self) -> float | None:
        """Return the effect of the last changes on f, to first order, or None if it is not known."""
        ...


class Response(Protocol):
    """Role: the response of y to a move of x."""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, point: Point, path: SearchPath, redirect: Redirect, state: RoleState) -> ResponseModel:
        """Return the model of y along the path, or along a path that `redirect` returns."""
        ...

    def commit(self, point: Point, model: ResponseModel, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class StepCheck(Protocol):
    """The check of one search. It is called for candidates that pass the test of sufficient decrease.

    If it has an attribute ``excused`` that is true after a step passed, the next search starts at the root of the
    usual factor times that step.
    """

    def __call__(self, step: float, surplus: float, model: ResponseModel, place: Place) -> bool:
        """Return whether the model of y holds at this step.

        Args:
            step: Step of the candidate. The parameters are at the candidate, and may be elsewhere afterwards.
            surplus: Distance of its value below the threshold of the search.
            model: The response.
            place: Moves the parameters to another candidate.
        """
        ...


class ModelCheck(Protocol):
    """Role: the range in which the model of y holds."""

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
    """Role: whether to search in this step.

    Attributes:
        keeps: Whether it keeps lengths while f still tells them apart.
    """

    keeps: bool

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def due(self, context: PaceContext, state: RoleState) -> bool:
        """Return whether to search for any f. The step then evaluates f with its gradients at once."""
        ...

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        """Return the step to take without a search, or None to search."""
        ...

    def regrets(self, context: PaceContext, state: RoleState) -> Sequence[Tensor] | None:
        """Return x before the last step, if that was kept and f shows that it must be undone; else None."""
        ...

    def commit(self, context: PaceContext, record: Record, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Momentum(Protocol):
    """Role: the direction of the step."""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        """Return the direction of the step."""
        ...

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Prediction(Protocol):
    """Role: whether y moves with x."""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def observe(self, gradient: Sequence[Tensor], lower: Sequence[Tensor], state: RoleState) -> Share | None:
        """Return what y and its gradient, where a search begins, show of the moves so far; None: nothing.

        Args:
            gradient: grad_y g at (x, y), on the lower sample of the step.
            lower: y.
            state: The role's.
        """
        ...

    def propose(self, context: PredictionContext, state: RoleState) -> PredictedMove | None:
        """Return how y moves, or None if it stays."""
        ...

    def commit(self, context: PredictionContext, move: PredictedMove | None, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class Diagnosis(Protocol):
    """Role: what limits the run."""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the texts of warnings."""
        ...

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...
