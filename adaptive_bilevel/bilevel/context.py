"""Inputs and outputs of the roles of an upper step."""

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
from .share import Share

__all__ = [
    "Change",
    "LowerLossChanged",
    "Mix",
    "MomentumContext",
    "PaceContext",
    "Place",
    "Point",
    "PredictedMove",
    "PredictionContext",
    "Redirect",
    "Taken",
]

Redirect = Callable[[list[Tensor]], SearchPath]
"""Returns the path of another hypergradient, with one tensor for each of ``gradient.tensors``."""

Place = Callable[[float], None]
"""Moves x and y to the candidate of a step size."""


class LowerLossChanged(Exception):
    """The lower loss is another one than that by which a model was made; the step begins again."""


@dataclass
class Point:
    """The point where an upper step begins, and the losses and gradients there.

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
        lr: The reference lr of the groups; 0 if no step is to be taken.
        beta: Decay of means, ``betas[0]``.
        f_x: Partial gradients of f by ``gradient.tensors``; empty before their evaluation, and after `release`.
        f_y: Partial gradients of f by ``lower``, likewise.
        scale: The step lengths of earlier searches.
        counts: Oracle calls of the optimizer.
        closure_checks: Findings of earlier searches about the closure.
        differentiated: Whether the partial gradients were evaluated. A step without a search needs f alone.
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
        """Drop the partial gradients. Only the response needs them."""
        self.f_x, self.f_y = [], []

    def processed(self, hypergradient: list[Tensor]) -> list[Tensor]:
        """Return a hypergradient of the response, changed as the host changes the user's."""
        if not isinstance(self.objective, Objective):
            return hypergradient
        tensors = self.gradient.tensors
        changed = self.objective.processed(tensors, hypergradient)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, changed, strict=True)]


class Change(NamedTuple):
    """How a lower gradient changed along a response.

    Attributes:
        size: The norm of the change.
        push: ||C^T d||. To first order, the change is step * push if y does not move.
        residual: ||C^T d - H w|| / ||C^T d||, the part of that change that remains if y moves by w.
        rounding: Bound of the rounding error in `size`.
        before: The norm of the lower gradient at (x, y); 0 if the lower problem is solved.
        along: The part of the change along C^T d.
    """

    size: float
    push: float
    residual: float
    rounding: float
    before: float = 0.0
    along: float = 0.0


class PaceContext(NamedTuple):
    """Input of a pace.

    Attributes:
        path: The path of the step, before the projection.
        scale: The step lengths of earlier searches.
        policy: The search policy. A pace reads its `c` and `shrink`; a search finds lengths up to a factor `shrink`.
        lr: The reference lr of the groups.
        closures: The known closures of both levels.
        before: Returns x at the start of the step, for the tensors of the path, and then y.
        solved: Whether the hypergradient has left its inverse, so that a search needs no solve of its own.
        part: The part of the step that a scheduler lets be taken.
        due: The result of `Pace.due`. This and the next attributes are known after the evaluation of f.
        value: f(x, y).
        rounding: Relative rounding unit of f.
    """

    path: SearchPath
    scale: Scale
    policy: Any
    lr: float
    closures: Any
    before: Callable[[], list[Tensor]]
    solved: bool = False
    part: float = 1.0
    due: bool = True
    value: float = math.nan
    rounding: float = 0.0


class MomentumContext(NamedTuple):
    """Input of a momentum.

    Attributes:
        gradient: The hypergradient of the search, with its tensors.
        descent: Its direction. ``descent.precondition`` is the metric.
        beta: Decay of means, ``betas[0]``.
    """

    gradient: Gradient
    descent: Descent
    beta: float


class Mix(NamedTuple):
    """Direction of the step, if it is not that of the search.

    Attributes:
        along: Computes the direction, in the metric and without the factors of groups. None for the searched direction.
        weight: Share of the mean of hypergradients in it, in [0, 1].
        averages: Whether a mean of hypergradients is kept.
        restarted: Whether that mean was restarted.
        memory: Data for ``commit``.
    """

    along: Callable[[], list[Tensor]] | None = None
    weight: float = 0.0
    averages: bool = False
    restarted: bool = False
    memory: Any = None


class PredictionContext(NamedTuple):
    """Input of a prediction.

    Attributes:
        offsets: w, the response of y to one unit of a step along the searched direction; None without a search.
        promised: <h, d> of that direction.
        mix: Direction of the step.
        beta: Decay of means, ``betas[0]``.
        lower: The lower level.
        gradient: The hypergradient of the step, with its tensors.
        step: The length of the step; 0 if x did not move.
        along: d, if w is wanted again, since steps without a search may follow; else None.
        curvature: <w, C^T d> / <w, w>, that of the lower loss along w by P; NaN if it is not known.
        share: The result of `Prediction.observe`; None if nothing was observed.
    """

    offsets: Sequence[Tensor] | None
    promised: float
    mix: Mix
    beta: float
    lower: Lower
    gradient: Gradient
    step: float
    along: Sequence[Tensor] | None = None
    curvature: float = math.nan
    share: Share | None = None


class PredictedMove(NamedTuple):
    """How y moves along with x: by step * part * response.

    Attributes:
        response: Of y, to one unit of the step.
        part: In [0, 1].
        share: What the part was taken from, for ``commit``.
    """

    response: list[Tensor]
    part: float = 1.0
    share: Share | None = None


class Taken(NamedTuple):
    """Result of a step.

    Attributes:
        record: Its record.
        comparable: Whether ``record.slope_ratio`` measures the user's hypergradient.
        solver: The response's solver, for messages.
        hessian: A report on the lower Hessian, or None if there is none.
        loss: f before the step.
        change: Length of the move of x relative to the size of x, before the factor of a scheduler.
        gain: Decrease of f that the hypergradient predicts for a move by 1 % of that size.
    """

    record: Record
    comparable: bool
    solver: Any
    hessian: HessianReport | None = None
    loss: float = math.nan
    change: float = math.nan
    gain: float = math.nan
