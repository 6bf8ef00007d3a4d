"""The upper step as a composition of roles: `BiSLS` and `OneStepBiSLS` fill them."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import warn
from ..evaluation.closures import Closure, require_closure
from ..evaluation.guard import Guard
from ..evaluation.objective import Objective
from ..evaluation.reductions import agree
from ..evaluation.tensors import gradients_of
from ..optim.direction import Gradient
from ..optim.projection import Section
from ..optim.search_path import SearchPath, scaled
from ..optim.state import RoleState, read_state, write_states
from ..policies import Outcome, Record, validation
from ..policies.scalars import resolution
from .diagnosis import SlopeDiagnosis
from .roles import (
    Diagnosis,
    ModelCheck,
    Momentum,
    MomentumContext,
    Pace,
    Point,
    Prediction,
    PredictionContext,
    Response,
    StepCheck,
    Taken,
)
from .scale import Scale
from .search import Answer, Found, Limits, nothing_to_search, search
from .upper import UpperOptimizer

__all__ = ["Roles", "SearchingOptimizer"]


class Roles(NamedTuple):
    """Who answers the questions of an upper step; the direction is an option of all optimizers."""

    response: Response
    check: ModelCheck
    pace: Pace
    momentum: Momentum
    prediction: Prediction
    diagnosis: Diagnosis


Entry = tuple[str, Sequence[Tensor], RoleState]


class SearchingOptimizer(UpperOptimizer):
    """An upper step by a line search along the user's hypergradient.

    Attributes:
        roles: The roles of the step, as the options name them.
        diagnosis: The Diagnosis role; another one may be set.
        project: The convex set of the upper variable; None: there is none.
    """

    mixes_momentum = True
    roles: Roles
    project: Any = None
    _diagnosis: Diagnosis = SlopeDiagnosis()
    _kept: ClassVar[tuple[str, ...]] = ("project", "_diagnosis")
    """Attributes that copying keeps, beside the options."""

    @property
    def diagnosis(self) -> Diagnosis:
        """The Diagnosis role."""
        return self._diagnosis

    @diagnosis.setter
    def diagnosis(self, diagnosis: Diagnosis) -> None:
        self._diagnosis = diagnosis
        self._make_roles()

    @abc.abstractmethod
    def _make_roles(self) -> None:
        """Set `roles` from the options."""

    def _check_lr(self, lr: float | None) -> None:
        validation.positive(type(self).__name__, "lr", lr, optional=True, below_infinity=True)

    def _make_policy(self, rule: Any) -> Any:
        self._make_roles()  # whenever the options have changed, as the policy
        return super()._make_policy(rule)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the roles are made from what is restored."""
        self.__dict__.update({name: state[name] for name in self._kept if name in state})
        super().__setstate__(state)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, upper_closure: Closure | None = None, lower_closure: Closure | Sequence[Closure | None] | None = None
    ) -> Tensor:
        """Search and take one upper step along .grad, and return the upper loss before it.

        Args:
            upper_closure: Returns the upper loss f(x, y) on the sample of the hypergradient. Evaluated once with
                gradients for x and y, and once per trial.
            lower_closure: Returns the lower loss g(x, y), or a list for several lower optimizers. Left out: the last
                closure that the lower optimizer stepped on (for stock optimizers, required).

        Raises:
            HypergradientError: No upper parameter has a .grad.
            LowerLevelError: The lower level is needed and missing, or there is no lower closure.
            ClosureError: A closure is missing or does not return an attached scalar.
            NonFiniteError: max_skips steps in a row were not finite.
        """
        if upper_closure is None and self.host is not None:
            loss: Tensor = self.host.step(self)
            return loss
        return self.advance(upper_closure, lower_closure)

    @torch.no_grad()
    def advance(self, upper_closure: Closure | None = None, lower_closure: Any = None) -> Tensor:
        """Do what `step` does, without torch's hooks around it: for hosts, whose own step is hooked already."""
        objective = require_closure(type(self).__name__, upper_closure)
        params, lower = self._parameters(), self.lower.tensors()
        hypergradient = self._hypergradient(params)
        messages: list[str] = []
        with Guard([*params, *lower], self._workspace) as guard:
            gradient = self._with_gradient(params, hypergradient)
            section = self._enter(guard, params, gradient)
            point = self._point(guard, objective, lower_closure, params, hypergradient, gradient, lower)
            check = self._check(point)
            found = self._find(point, section, check)
            guard.put_back()
            if found.record.outcome == Outcome.non_finite:
                guard.undo()
            elif found.record.outcome != Outcome.zero_gradient:
                messages = self._take(point, found, check)
        self._conclude(found.record, found.state)
        for message in messages:
            warn(f"{type(self).__name__}: {message}")
        return point.loss

    # ------------------------------------------------------------------------------------------ where the step begins

    def _enter(self, guard: Guard, params: list[Tensor], gradient: Gradient) -> Section | None:
        """Return the convex set of what moves, and project x into it."""
        if self.project is None:
            return None
        section = Section.of(self.project, params, gradient.tensors, gradient.factors)
        section.enter(guard, params)
        return section

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
            loss, found = known
        guard.mark()
        factors = self._each_factor()
        return Point(
            guard=guard,
            objective=objective,
            params=params,
            gradient=gradient,
            moving=[
                (p, h) for p, h, w in zip(params, hypergradient, factors, strict=True) if w != 0.0 and p.requires_grad
            ],
            lower=lower,
            problems=lambda: self.lower.problems(lower_closure, guard),
            loss=loss,
            value=float(agree(loss)[0]),
            f_x=gradients_of(gradient.tensors, params, found[: len(params)]),
            f_y=gradients_of(lower, lower, found[len(params) :]),
            scale=Scale(self._rule_state().previous, bool(self._saved("rejected", False))),
            counts=self.evaluations,
        )

    def _state_of(self, name: str, role: Any, tensors: Sequence[Tensor] = ()) -> RoleState:
        return read_state(self.state, name, tensors, role.init())

    # ------------------------------------------------------------------------------------------ what the step finds

    def _check(self, point: Point) -> StepCheck:
        return self.roles.check.propose(point, self._state_of("check", self.roles.check))

    @abc.abstractmethod
    def _limits(self, point: Point, path: SearchPath) -> Limits:
        """Return what the search along a path may try."""

    def _path(self, gradient: Gradient) -> SearchPath:
        """Return the path along the preconditioned h; a group's lr counts as a part of its direction."""
        descent = self._descent(gradient)
        return SearchPath(gradient, scaled(descent.precondition(gradient.values), gradient.factors), descent)

    def _find(self, point: Point, section: Section | None, check: StepCheck) -> Found:
        """Return what the step does: nothing, a step without a search, or a searched one."""
        path, lr, rounding = self._path(point.gradient), self._reference_lr(), resolution(point.loss)
        record = nothing_to_search(point, path, lr, rounding)
        if record is not None:
            return Found(record, path, self._rule_state())
        limits = self._limits(point, path)

        def within(path: SearchPath) -> SearchPath:
            return path if section is None else _within(point, path, section, limits)

        def redirect(hypergradient: list[Tensor]) -> SearchPath:
            return within(self._path(point.gradient._replace(values=_processed(point, hypergradient))))

        kept = self.roles.pace.propose(point, path, self._state_of("pace", self.roles.pace))
        path = within(path)
        if kept is not None:
            step = min(kept, path.longest, limits.most)
            return Found(Record(step, step, path.longest, Outcome.accepted, slope=path.promised), path, limits.state)
        record = nothing_to_search(point, path, lr, rounding)
        if record is not None:
            return Found(record, path, limits.state)
        response = self.roles.response
        before = self._state_of("response", response)
        model = response.propose(point, path, redirect, before)
        point.release()
        record, state = search(point, model, check, limits)
        answer = Answer(model.offsets, model.comparable, response.commit(point, model, before))
        return Found(record, model.path, state, answer)

    # ------------------------------------------------------------------------------------------ what is left behind

    def _take(self, point: Point, found: Found, check: StepCheck) -> list[str]:
        """Take the step, write the states of all roles at once, and return what the diagnosis says."""
        roles, record, path, messages = self.roles, found.record, found.path, list[str]()
        tensors, beta = path.gradient.tensors, float(self.param_groups[0]["betas"][0])
        context = MomentumContext(path.gradient, path.descent, beta)
        before = self._state_of("momentum", roles.momentum, tensors)
        path.rest()
        mix = roles.momentum.propose(context, before)
        if path.replaced or mix.along is None:
            mix = mix._replace(along=None, weight=0.0)
        if record.moved:
            path.take(record.step_size, mix.along)
        entries: list[Entry] = [
            ("check", (), roles.check.commit(point, check, self._state_of("check", roles.check))),
            ("pace", (), roles.pace.commit(point, record, self._state_of("pace", roles.pace))),
            self._direction_entry(path.gradient, path.descent),
            ("momentum", tensors, roles.momentum.commit(context, mix, before)),
        ]
        if found.answer is not None:
            entries.append(("response", (), found.answer.state))
            comparable = found.answer.comparable and not getattr(point.objective, "rescaled", False)
            taken = Taken(record, comparable, getattr(roles.response, "solver", None))
            state = self._state_of("diagnosis", roles.diagnosis)
            messages = roles.diagnosis.propose(taken, state)
            entries.append(("diagnosis", (), roles.diagnosis.commit(taken, messages, state)))
            if found.answer.offsets is not None:
                entries.append(self._predict(PredictionContext(found.answer.offsets, mix, beta, self.lower), record))
        path.release()
        del before, mix, context  # what is written takes the place of what they hold
        write_states(self.state, entries)
        if record.moved or record.trials > 1:
            rejected = {"rejected": True} if record.trials > 1 else {}
            self._save_rule_state(found.state if record.moved else self._rule_state(), **rejected)
        return messages

    def _predict(self, context: PredictionContext, record: Record) -> Entry:
        """Let y move along if the step moved, and return the prediction's state."""
        role = self.roles.prediction
        before = self._state_of("prediction", role)
        response = role.propose(context, before)
        after = role.commit(context, response, before)
        if response is not None and record.moved:
            role.deliver(context, response, record.step_size)
        return "prediction", (), after


def _within(point: Point, path: SearchPath, section: Section, limits: Limits) -> SearchPath:
    """Return the path that stays in the convex set up to the first trial."""
    longest = limits.policy.first_trial(
        limits.state, loss=point.value, slope=path.promised, bound=limits.bound, scale=limits.scale
    )
    if math.isfinite(longest) and longest > 0.0:
        return path.within(point.params, section, longest)
    return path


def _processed(point: Point, hypergradient: list[Tensor]) -> list[Tensor]:
    """Return a hypergradient of the response's as whoever steps would have changed the user's."""
    if not isinstance(point.objective, Objective):
        return hypergradient
    changed = point.objective.processed(point.gradient.tensors, hypergradient)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(point.gradient.tensors, changed, strict=True)]
