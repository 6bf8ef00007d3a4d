"""What the roles of an upper step are given, and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.counts import Evaluations
from ..evaluation.guard import Closure, Guard
from ..evaluation.objective import Objective
from ..hypergradient.solution import HessianReport
from ..optim.closure_checks import ClosureChecks
from ..optim.direction import Descent, Gradient
from ..optim.search_path import SearchPath
from ..policies import Record
from .lower import Lower, LowerProblem
from .scale import Scale

__all__ = [
    "Change",
    "Mix",
    "MomentumContext",
    "PaceContext",
    "Place",
    "Point",
    "PredictionContext",
    "Redirect",
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
        rounding: Relative rounding unit of f.
        lr: The reference lr of the groups; 0: no step is wanted.
        beta: Decay of means, ``betas[0]``.
        f_x: Partial gradients of f by ``gradient.tensors``; empty before they are taken, and after `release`.
        f_y: Partial gradients of f by ``lower``; likewise.
        scale: What earlier searches have shown of the right step length.
        counts: Oracle calls of the optimizer.
        closure_checks: What its searches have shown of the closure.
        differentiated: Whether the partial gradients were taken; a step without a search needs f alone.
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
    rounding: float
    lr: float
    beta: float
    f_x: list[Tensor]
    f_y: list[Tensor]
    scale: Scale
    counts: Evaluations
    closure_checks: ClosureChecks
    differentiated: bool = True

    def release(self) -> None:
        """Drop the partial gradients, which only the response needs."""
        self.f_x, self.f_y = [], []

    def processed(self, hypergradient: list[Tensor]) -> list[Tensor]:
        """Return a hypergradient of the response's as whoever steps would have changed the user's."""
        if not isinstance(self.objective, Objective):
            return hypergradient
        tensors = self.gradient.tensors
        changed = self.objective.processed(tensors, hypergradient)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, changed, strict=True)]


class Change(NamedTuple):
    """How a lower gradient changed along a response.

    Attributes:
        size: The norm of the change.
        push: ||C^T d||: without any answer of y, the change would be step * push to first order.
        residual: ||C^T d - H w|| / ||C^T d||: with the answer w, it still is that part of it.
        rounding: What of `size` may be rounding.
        before: The norm of the lower gradient at (x, y), which is 0 where the lower problem is solved.
        along: The part of the change along C^T d: what of the effect of x the linear model overstates.
    """

    size: float
    push: float
    residual: float
    rounding: float
    before: float = 0.0
    along: float = 0.0


class PaceContext(NamedTuple):
    """What a pace is given.

    Attributes:
        path: The path of the step, before it is cut by a convex set.
        scale: What earlier searches have shown of the right step length.
        policy: The search policy: its `c`, and `shrink`, the factor that it knows a length to.
        lr: The reference lr of the groups.
        closures: Of both levels, as far as they are known.
        before: Returns x where the step begins, for the tensors of the path.
        due: What `Pace.due` has said; this and what follows is known once f is evaluated.
        value: f(x, y).
        rounding: Relative rounding unit of f.
    """

    path: SearchPath
    scale: Scale
    policy: Any
    lr: float
    closures: Any
    before: Callable[[], list[Tensor]]
    due: bool = True
    value: float = math.nan
    rounding: float = 0.0


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


class PredictionContext(NamedTuple):
    """What a prediction is given.

    Attributes:
        offsets: w, how y answers to one unit of a step along the searched direction; None: there was no search.
        promised: <h, d> of that direction.
        mix: What is stepped along.
        beta: Decay of means, ``betas[0]``.
        lower: The lower level.
        keeps: Whether there may be steps without a search, so that the tangent is wanted again.
    """

    offsets: Sequence[Tensor] | None
    promised: float
    mix: Mix
    beta: float
    lower: Lower
    keeps: bool = True


class Taken(NamedTuple):
    """How a step ended.

    Attributes:
        record: Its record.
        comparable: Whether ``record.slope_ratio`` says something of the user's hypergradient.
        solver: The response's solver, for messages.
        hessian: What its solve has shown of the lower Hessian; None: not known.
        loss: f before it.
        change: By how much x has moved, relative to its size; without what a scheduler has taken.
        gain: What the hypergradient promises of a move by 1 % of that size.
    """

    record: Record
    comparable: bool
    solver: Any
    hessian: HessianReport | None = None
    loss: float = math.nan
    change: float = math.nan
    gain: float = math.nan
