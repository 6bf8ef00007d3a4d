"""The roles of an upper step: a protocol for each, and what it is given.

A role answers one question of the step. ``init()`` gives its state before the first step, ``propose(context, state)``
its answer, and ``commit(context, answer, state)`` what is new in the state after the step. The state is a `RoleState`
of plain numbers and tensors, an entry of its own in the optimizer's state. A role sees the context, never the
optimizer. ``commit`` is not called for a step that must leave no trace, and all states are written at once, after the
last role has committed.

The Direction role (along what) is that of the lower optimizers, too: `adaptive_bilevel.optim.direction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..evaluation.counts import Evaluations
from ..evaluation.guard import Closure, Guard
from ..optim.direction import Descent, Gradient
from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from ..policies import Record
from .lower import Lower, LowerProblem
from .scale import Scale

__all__ = [
    "Change",
    "Diagnosis",
    "Mix",
    "ModelCheck",
    "Momentum",
    "MomentumContext",
    "Pace",
    "Place",
    "Point",
    "Prediction",
    "PredictionContext",
    "Redirect",
    "Response",
    "ResponseModel",
    "StepCheck",
    "Taken",
]

Redirect = Callable[[list[Tensor]], SearchPath]
"""Returns the path of another hypergradient (one tensor for each of ``gradient.tensors``) than the user's."""

Place = Callable[[float], None]
"""Puts x and y to the candidate of a step size."""


@dataclass
class Point:
    """Where an upper step begins, and what it has evaluated there.

    Attributes:
        guard: The step's guard, which evaluates closures and puts tensors back.
        objective: The upper closure.
        params: All upper tensors.
        gradient: The upper tensors that have a hypergradient, with it.
        moving: All upper tensors that may move (trainable, lr above 0), each with its hypergradient or None.
        lower: The lower tensors.
        problems: Returns the lower problems.
        loss: f(x, y), detached.
        value: The same as a number, agreed on by all processes.
        f_x: Partial gradients of f by ``gradient.tensors``; empty after `release`.
        f_y: Partial gradients of f by ``lower``; empty after `release`.
        scale: What earlier searches have shown of the right step length.
        counts: Oracle calls of the optimizer.
    """

    guard: Guard
    objective: Closure
    params: list[Tensor]
    gradient: Gradient
    moving: list[tuple[Tensor, Tensor | None]]
    lower: list[Tensor]
    problems: Callable[[], list[LowerProblem]]
    loss: Tensor
    value: float
    f_x: list[Tensor]
    f_y: list[Tensor]
    scale: Scale
    counts: Evaluations

    def release(self) -> None:
        """Drop the partial gradients, which only the response needs."""
        self.f_x, self.f_y = [], []


class Change(NamedTuple):
    """How a lower gradient changed along a response.

    Attributes:
        size: The norm of the change.
        push: ||C^T d||: without any answer of y, the change would be step * push to first order.
        residual: ||C^T d - H w|| / ||C^T d||: with the answer w, it still is that part of it.
        rounding: What of `size` may be rounding.
    """

    size: float
    push: float
    residual: float
    rounding: float


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
    """Is a search due?"""

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, point: Point, path: SearchPath, state: RoleState) -> float | None:
        """Return the step to take without a search, or None if a search is due."""
        ...

    def commit(self, point: Point, record: Record, state: RoleState) -> RoleState:
        """Return what is new in the state after the step."""
        ...


class MomentumContext(NamedTuple):
    """What a momentum is given.

    Attributes:
        gradient: The hypergradient that the search was along, with its tensors.
        descent: Its direction: ``descent.precondition`` is the metric.
        beta: Decay of means, ``betas[0]``.
    """

    gradient: Gradient
    descent: Descent
    beta: float


class Mix(NamedTuple):
    """The direction that is stepped along, where it is not the searched one.

    Attributes:
        along: Computes it (in the metric, without the factors of groups); None: the searched direction.
        weight: How much of it is along the mean of hypergradients, in [0, 1].
        averages: Whether a mean of hypergradients is kept.
        restarted: Whether that mean was started anew.
        memory: What ``commit`` needs.
    """

    along: Callable[[], list[Tensor]] | None = None
    weight: float = 0.0
    averages: bool = False
    restarted: bool = False
    memory: Any = None


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


class PredictionContext(NamedTuple):
    """What a prediction is given.

    Attributes:
        offsets: w, how y answers to one unit of a step along the searched direction.
        mix: What is stepped along.
        beta: Decay of means, ``betas[0]``.
        lower: The lower level.
    """

    offsets: Sequence[Tensor]
    mix: Mix
    beta: float
    lower: Lower


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


class Taken(NamedTuple):
    """How a step ended.

    Attributes:
        record: Its record.
        comparable: Whether ``record.slope_ratio`` says something of the user's hypergradient.
        solver: The response's solver, for messages.
    """

    record: Record
    comparable: bool
    solver: Any


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
