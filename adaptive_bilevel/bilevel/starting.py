"""Where a searched upper step begins: f, f_x and f_y at (x, y), the convex set of x, and whether to go back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation import foreach
from ..evaluation.closures import Closure
from ..evaluation.guard import Guard, RandomState
from ..evaluation.means import averaged
from ..evaluation.objective import Objective
from ..evaluation.parts import any_in_parts
from ..evaluation.reductions import agree
from ..evaluation.tensors import gradients_of
from ..hypergradient.same_point import Handover
from ..hypergradient.shared_basis import waits
from ..optim.direction import Gradient
from ..optim.projection import Section
from ..optim.search_path import SearchPath
from ..optim.state import RoleState, write_states
from ..policies import Outcome, Record
from ..policies.scalars import resolution
from .context import PaceContext, Point
from .last_step import departed
from .lower import Lower, LowerLevel
from .retreat import Retreat
from .roles import Pace
from .scale import Scale
from .search import Found
from .secant import Secants
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

    def _prepare(self) -> None:
        super()._prepare()
        self._retreat = Retreat()
        self._handover = Handover()

    def _forget(self) -> None:
        super()._forget()
        self._retreat.forget()

    def advance(self, *args: Any, **options: Any) -> Tensor | float:
        """Do what `step` does, and drop what the hypergradient has left for it."""
        try:
            return super().advance(*args, **options)
        finally:
            self._handover.release()

    def _follow(self, level: Lower) -> None:
        """Take a lower level; whether the options fit the parameters is known then."""
        super()._follow(level)
        self._require_whole(self.project)

    def _require_whole(self, project: Any) -> None:
        if project is not None and any_in_parts(self._parameters()):
            raise OptionError(
                f"{type(self).__name__}(project={project!r}): upper parameters are in parts (fully_shard), and a "
                "projection is of whole ones; compute the variable from parameters that are free (a sigmoid for a box, "
                "a softmax for a simplex), or keep them whole"
            )

    def _begin(
        self, guard: Guard, objective: Closure | None, params: list[Tensor], given: list[Tensor | None] | None
    ) -> list[Tensor | None]:
        """Return the hypergradient of the step; that of a direct loss in the convex set, if there is one."""
        if isinstance(objective, DirectLoss):
            objective.hidden = self._between.hidden
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
        self._require_whole(project)
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
        differentiated: bool,
    ) -> Point:
        """Return f at (x, y), with f_x and f_y if they are wanted already, or known."""
        tensors = [*params, *lower]
        known = objective.evaluated(tensors) if isinstance(objective, Objective) else None
        partials: list[Tensor] | None
        if known is not None:
            loss, found = known.loss, averaged(known.gradients, tensors)
            partials = self._partials(gradient, lower, tensors, found)
        elif differentiated and not self._handover.has_upper:
            loss, partials = self._differentiated(guard, objective, gradient, lower, tensors)
        else:
            random = guard.random_state()
            self.evaluations.upper.values += 1
            value = guard.value(objective)
            wide = torch.promote_types(params[0].dtype, torch.float32)
            loss = value if isinstance(value, Tensor) else torch.tensor(value, dtype=wide)
            partials = self._handover.take_upper(value, [*gradient.tensors, *lower]) if differentiated else None
            if differentiated and partials is None:
                loss, partials = self._differentiated(guard, objective, gradient, lower, tensors, random)
        guard.mark()
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
            f_x=[] if partials is None else partials[: len(gradient.tensors)],
            f_y=[] if partials is None else partials[len(gradient.tensors) :],
            scale=self._scale(),
            counts=self.evaluations,
            closure_checks=self._closure_checks,
            differentiated=partials is not None,
        )

    def _went_back(
        self, pace: Pace, point: Point, paced: PaceContext, states: Mapping[str, RoleState], messages: list[str]
    ) -> Found | None:
        """Put x and y to an earlier point where f says so, and return what is left of the step; None: it goes on."""
        state, after = states["retreat"], point.scale.state
        news = dict[str, RoleState]()
        outcome, before = Outcome.undone, pace.regrets(paced, states["pace"])
        if before is None:
            anchor = self._retreat.propose(point, self._between, state)
            if anchor is None:
                return None
            outcome, before = Outcome.returned, anchor.tensors
            messages.append(self._retreat.message(point, state))
            news["retreat"] = self._retreat.returned(anchor, state)
            length = self._retreat.length(anchor, float(after.previous), paced.policy.shrink)
            after = after._replace(previous=length, last_gain=0.0)
        record = Record(0.0, 0.0, math.inf, outcome, slope=paced.path.promised)
        point.guard.put_back()
        point.guard.withdraw()
        tensors = paced.path.gradient.tensors
        foreach.copy_([*tensors, *point.lower], before)
        self.lower.upper_moved()
        if outcome == Outcome.returned:
            self.lower.restart()
        news = {"pace": pace.commit(paced, record, states["pace"]), **news}
        if any(states["last_step"].each):
            news["last_step"] = departed(paced.path.gradient)
        if not point.lower:
            news["secants"] = Secants.nothing()
        write_states(self.state, news, tensors)
        self._save_rule_state(after, kept=0)
        return Found(record, paced.path, after)

    def _paced(self, guard: Guard, path: SearchPath, objective: Closure, lower_closure: Any) -> PaceContext:
        """Return what the pace is given before f is evaluated."""
        below = self.lower.closures if lower_closure is None and isinstance(self.lower, LowerLevel) else lower_closure

        def before() -> list[Tensor]:
            tensors = [*self._parameters(), *self.lower.tensors()]
            copies = dict(zip(map(id, tensors), guard.copy(), strict=True))
            return [copies[id(p)] for p in [*path.gradient.tensors, *self.lower.tensors()]]

        closures, solved = (objective, below), waits(self.lower.tensors())
        part = self._schedule()[1] if self._unbounded else 1.0
        return PaceContext(path, self._scale(), self.policy, self._reference_lr(), closures, before, solved, part)

    def _scale(self) -> Scale:
        """Return what earlier searches have shown of the right step length."""
        saved = self._saved
        empty = Scale(self._rule_state(), rejected=False)
        return empty._replace(**{name: saved(name, getattr(empty, name)) for name in Scale._fields[1:]})

    def _differentiate(self, point: Point) -> None:
        """Take f_x and f_y, if only f was evaluated so far."""
        if point.differentiated:
            return
        tensors, width = [*point.params, *point.lower], len(point.gradient.tensors)
        partials = self._handover.take_upper(point.loss, [*point.gradient.tensors, *point.lower])
        if partials is None:
            point.loss, partials = self._differentiated(
                point.guard, point.objective, point.gradient, point.lower, tensors, point.guard.entry
            )
            point.guard.mark()
            point.value = float(agree(point.loss)[0])
        point.differentiated = True
        point.f_x, point.f_y = partials[:width], partials[width:]

    def _differentiated(
        self,
        guard: Guard,
        objective: Closure,
        gradient: Gradient,
        lower: list[Tensor],
        tensors: list[Tensor],
        random: RandomState | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return f, and f_x and f_y in a row."""
        self.evaluations.upper.gradients += 1
        loss, found = guard.gradient(objective, tensors, random)
        partials = self._partials(gradient, lower, tensors, found)
        self._handover.compare_upper(loss, [*gradient.tensors, *lower], partials)
        return loss, partials

    def _partials(
        self, gradient: Gradient, lower: list[Tensor], tensors: list[Tensor], found: list[Tensor | None]
    ) -> list[Tensor]:
        if lower and all(g is None for g in found[len(tensors) - len(lower) :]):
            self._closure_checks.say("apart", _APART)
        return gradients_of([*gradient.tensors, *lower], tensors, found)
