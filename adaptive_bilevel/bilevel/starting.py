"""Where a searched upper step begins: f, f_x and f_y at (x, y), and the convex set of x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..evaluation.closures import Closure
from ..evaluation.guard import Guard
from ..evaluation.means import averaged
from ..evaluation.objective import Objective
from ..evaluation.reductions import agree
from ..evaluation.tensors import gradients_of
from ..optim.direction import Gradient
from ..optim.projection import Section
from ..policies.scalars import resolution
from .context import Point
from .scale import Scale
from .source import DirectLoss
from .upper import UpperOptimizer

__all__ = ["StartingOptimizer"]

_APART = (
    "the upper loss does not depend on any parameter of the lower optimizer. If the inner model or its optimizer was "
    "made anew, call bind(the new lower optimizer) on this one; if the loss is computed from copies of the parameters "
    "(detach, clone().data, an average of weights), compute it from the parameters themselves"
)


class StartingOptimizer(UpperOptimizer):
    """The beginning of a searched upper step; `SearchingOptimizer` derives from it.

    Attributes:
        project: The convex set of the upper variable; None: there is none.
    """

    project: Any = None

    def _begin(
        self, guard: Guard, objective: Closure | None, params: list[Tensor], given: list[Tensor | None] | None
    ) -> list[Tensor | None]:
        """Return the hypergradient of the step; that of a direct loss in the convex set, if there is one."""
        found = super()._begin(guard, objective, params, given)
        if isinstance(objective, DirectLoss) and self.project is not None:
            self._enter(guard, objective, params, found)
            if objective.evaluated(params) is None:
                found = objective.begin(guard, params, self.evaluations, guard.entry)
        return found

    def _enter(
        self, guard: Guard, objective: Closure, params: list[Tensor], hypergradient: Sequence[Tensor | None]
    ) -> tuple[Section | None, Gradient]:
        """Return the convex set of what moves, with x projected into it, and the hypergradient with its tensors."""
        gradient = self._with_gradient(params, hypergradient)
        hosted = objective.project if isinstance(objective, Objective) else None
        project = hosted if self.project is None else self.project
        if project is None:
            return None, gradient
        section = Section.of(project, params, gradient.tensors, gradient.factors)
        section.enter(guard, params)
        return section, gradient

    def _point(
        self,
        guard: Guard,
        objective: Closure,
        lower_closure: Any,
        params: list[Tensor],
        hypergradient: Sequence[Tensor | None],
        gradient: Gradient,
        lower: list[Tensor],
    ) -> Point:
        """Return f, f_x and f_y at (x, y)."""
        tensors = [*params, *lower]
        known = objective.evaluated(tensors) if isinstance(objective, Objective) else None
        if known is None:
            self.evaluations.upper.gradients += 1
            loss, found = guard.gradient(objective, tensors)
        else:
            loss, found = known.loss, averaged(known.gradients, tensors)
        guard.mark()
        if lower and all(g is None for g in found[len(params) :]):
            self._closure_checks.say("apart", _APART)
        partials = gradients_of([*gradient.tensors, *lower], tensors, found)
        parts = zip(params, hypergradient, self._each_factor(), strict=True)
        return Point(
            guard=guard,
            objective=objective,
            params=params,
            gradient=gradient,
            moving=[(p, h) for p, h, w in parts if w != 0.0 and p.requires_grad],
            lower=lower,
            problems=lambda: self.lower.problems(lower_closure, guard),
            loss=loss,
            value=float(agree(loss)[0]),
            rounding=resolution(loss),
            lr=self._reference_lr(),
            beta=float(self.param_groups[0]["betas"][0]),
            f_x=partials[: len(gradient.tensors)],
            f_y=partials[len(gradient.tensors) :],
            scale=Scale(self._rule_state(), self._saved("rejected", False), self._saved("shortest", math.inf)),
            counts=self.evaluations,
            closure_checks=self._closure_checks,
        )
