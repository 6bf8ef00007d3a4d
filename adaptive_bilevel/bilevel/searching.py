"""The upper step as a composition of roles, for `BiSLS` and `OneStepBiSLS`."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import warn
from ..evaluation.closures import Closure, require_closure
from ..evaluation.guard import Guard
from ..evaluation.means import averaged
from ..hypergradient.solution import HessianReport
from ..optim.direction import Gradient
from ..optim.projection import Section
from ..optim.search_path import SearchPath, scaled
from ..optim.state import RoleState, read_states, write_states
from ..policies import GuardedSLS, Outcome, validation
from ..policies.margin import shortened
from . import stiffness
from .between_steps import PROJECT
from .context import LowerLossChanged, MomentumContext, PaceContext, Point, PredictionContext, Taken
from .diagnosis import Diagnoses, SlopeDiagnosis, SolveDiagnosis, StallDiagnosis, motion
from .functional import UpperLoss
from .last_step import departed, onward
from .momentum import shrunk
from .prediction import observed, predicted
from .retreat import Retreat
from .roles import Diagnosis, ModelCheck, Momentum, Pace, Prediction, Response, StepCheck
from .scale import visible
from .search import Answer, Found, Limits, nothing_to_search, search
from .secant import Secants
from .starting import StartingOptimizer

__all__ = ["Roles", "SearchingOptimizer"]


class Roles(NamedTuple):
    """The roles of an upper step. The direction is an option of all optimizers, and not listed here."""

    response: Response
    check: ModelCheck
    pace: Pace
    momentum: Momentum
    prediction: Prediction
    diagnosis: Diagnosis


class SearchingOptimizer(StartingOptimizer):
    """An upper step by a line search along the user's hypergradient.

    Attributes:
        roles: The roles of the step, as the options name them.
        diagnosis: The Diagnosis role, which can be set.
        hessian: A report on the lower Hessian from the last step that was searched, or None if there was no solve.
    """

    mixes_momentum = True
    roles: Roles
    hessian: HessianReport | None = None
    _diagnosis: Diagnosis = Diagnoses((SlopeDiagnosis(), SolveDiagnosis(), StallDiagnosis()))
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
        direction, roles = self.conduct.direction, self.roles._asdict().items()
        own = {"last_step": RoleState(), "retreat": Retreat.init(), "secants": Secants.init()}
        own["stiffness"] = stiffness.init()
        own["direction"] = RoleState() if isinstance(direction, str) else direction.init()
        self._first_states = {name: role.init() for name, role in roles} | own
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
        self,
        upper_closure: UpperLoss | None = None,
        lower_closure: Closure | Sequence[Closure | None] | None = None,
        *,
        closure: UpperLoss | None = None,
        lower: Any = None,
        hypergradient: Any = None,
    ) -> Tensor:
        """Search and take one upper step along the hypergradient, and return the upper loss before the step.

        Args:
            upper_closure: Returns the upper loss f(x, y) on the sample of the hypergradient. It is evaluated once with
                gradients for x and y (or without, if they are the hypergradient's), and once for each trial.
            lower_closure: Returns the lower loss g(x, y); a list for several lower optimizers. By default, the last
                closure of the lower optimizer. Optimizers of `torch.optim` do not store theirs and need it here.
            closure: Another name of `upper_closure`, as in `torch.optim`.
            lower: For functional code, (tensors, loss): the lower variable that the inner loop returned, and the lower
                loss as a function of it. `upper_closure` then takes the lower variable too. After the step, `answer`
                holds it. See `adaptive_bilevel.bilevel.functional`.
            hypergradient: Tensors, or an estimator for this step. See `adaptive_bilevel.bilevel.source`.

        Raises:
            HypergradientError: No upper parameter has a .grad, or the hypergradient does not fit.
            LowerLevelError: The lower level is needed and missing, or there is no lower closure.
            ClosureError: A closure is missing, or does not return a scalar that requires a gradient.
            NonFiniteError: The loss or a gradient was not finite in max_skips steps in a row.
        """
        upper_closure = self._one_closure(upper_closure, closure)
        if self._is_prepared_only(upper_closure):
            return torch.zeros(())
        if upper_closure is None and self.host is not None:
            loss: Tensor = self.host.step(self)
            return loss
        before = self.advance(upper_closure, lower_closure, lower=lower, hypergradient=hypergradient)
        assert isinstance(before, Tensor)
        return before

    def _advance(
        self, upper_closure: Closure | None, lower_closure: Any, hypergradient: list[Tensor | None] | None
    ) -> Tensor:
        objective = require_closure(type(self).__name__, upper_closure)
        params, lower, messages = self._parameters(), self.lower.tensors(), list[str]()
        followed = self.lower if lower_closure is None else None
        self._between.begin(params, followed)
        with Guard([*params, *lower], self._workspace) as guard:
            hypergradient = averaged(self._begin(guard, objective, params, hypergradient), params)
            section, gradient = self._enter(guard, objective, params, hypergradient)
            states = read_states(self.state, self._first_states, gradient.tensors)
            path = self._path(gradient, states)
            paced = self._paced(guard, path, objective, lower_closure)
            due = self.roles.pace.due(paced, states["pace"])
            point = self._point(guard, objective, lower_closure, params, hypergradient, gradient, lower, due)
            paced = paced._replace(due=due, value=point.value, rounding=point.rounding)
            found = self._went_back(self.roles.pace, point, paced, states, messages)
            if found is None:
                check = self.roles.check.propose(point, states["check"])
                found = self._find(point, paced, section, check, states)
                guard.put_back()
                if found.record.outcome == Outcome.non_finite:
                    guard.undo()
                elif found.record.outcome != Outcome.zero_gradient:
                    messages = self._take(point, paced, found, check, states)
        remedy = None if section is not None else getattr(self.host, "constraint", PROJECT)
        messages += self._between.end(params, followed, remedy, point.value)
        hessian = None if found.answer is None else found.answer.hessian
        self.hessian = self.hessian if found.record.outcome == Outcome.kept else hessian
        self._conclude(self._scheduled(found.record), found.state, point.loss, hessian)
        for message in messages:
            warn(f"{type(self).__name__}: {message}")
        return point.loss

    # ------------------------------------------------------------------------------------------ what the step finds

    @abc.abstractmethod
    def _limits(self, point: Point, path: SearchPath) -> Limits:
        """Return what the search along a path may try."""

    def _path(self, gradient: Gradient, states: Mapping[str, RoleState]) -> SearchPath:
        """Return the path along the preconditioned h; a group's lr counts as a part of its direction."""
        role = shrunk(self._direction(), self.roles.momentum, states["momentum"])
        descent = role.propose(gradient, states["direction"])
        return SearchPath(gradient, scaled(descent.precondition(gradient.values), gradient.factors), descent)

    def _find(
        self,
        point: Point,
        paced: PaceContext,
        section: Section | None,
        check: StepCheck,
        states: Mapping[str, RoleState],
    ) -> Found:
        """Return what the step does: nothing, a step without a search, or a searched one."""
        roles, before, path = self.roles, point.scale.state, paced.path
        record = nothing_to_search(point, path)
        if record is not None:
            return Found(record, path, before)
        limits = self._limits(point, path).calmed(states["stiffness"])
        if isinstance(limits.policy, GuardedSLS):
            limits = limits._replace(onward=onward(point.gradient, states["last_step"]))

        def within(path: SearchPath) -> SearchPath:
            return path if section is None else limits.within(point, path, section)

        def redirect(hypergradient: list[Tensor]) -> SearchPath:
            return within(self._path(point.gradient._replace(values=point.processed(hypergradient)), states))

        secants = Secants(paced.policy.c)
        path = within(path)
        seen = secants.propose(point, path, states) if secants.apply(point, roles.momentum, roles.pace) else None
        led = None if seen is None else limits.led(point, seen.lead, section)
        if led is not None:
            path, limits = led[0].path, led[1]
        else:
            step = roles.pace.propose(paced, states["pace"])
            if step is not None:
                return limits.keep(path, point.value, step)._replace(seen=seen)
        self._differentiate(point)
        record = nothing_to_search(point, path) if path.cut else None
        if record is not None:
            return Found(record, path, limits.state, seen=seen)
        model = roles.response.propose(point, path, redirect, states["response"])
        point.release()
        if model.path is not path and limits.onward is not None:  # along another hypergradient than the user's
            limits = limits._replace(onward=onward(model.path.gradient, states["last_step"]))
        share = observed(roles.prediction, model, point.lower, states["prediction"])
        calm = stiffness.seen(states["stiffness"], getattr(model, "hessian", None), float(before.previous))
        try:
            record, after = search(point, model, check, limits.calmed(calm))
        except LowerLossChanged:
            point.differentiated = False
            return self._find(point, paced, section, check, states)
        answer = Answer.of(model, roles.response.commit(point, model, states["response"]), share)
        after = after if led is None else after._replace(previous=led[0].length)
        return Found(record, model.path, after, answer, seen)

    # ------------------------------------------------------------------------------------------ what is left behind

    def _take(
        self, point: Point, paced: PaceContext, found: Found, check: StepCheck, states: dict[str, RoleState]
    ) -> list[str]:
        """Take the step, write the states of all roles at once, and return what the diagnosis says."""
        roles, record, path, answer = self.roles, found.record, found.path, found.answer
        told = Answer() if answer is None else answer
        change, gain = motion(path, record.step_size) if answer is not None else (math.nan, math.nan)
        moved, step, excused = record.moved, self._scheduled(record).step_size, bool(getattr(check, "excused", False))
        context = MomentumContext(path.gradient, path.descent, point.beta)
        along = list(path.along) if roles.pace.keeps and not paced.solved and answer is not None else None
        path.rest()
        mix = roles.momentum.propose(context, states["momentum"])
        if path.replaced or mix.along is None:
            mix = mix._replace(along=None, weight=0.0)
        looks, searched = Secants.apply(point, roles.momentum, roles.pace), answer is not None
        departs = moved and searched and (looks or isinstance(self.policy, GuardedSLS))
        news = {"last_step": departed(path.gradient)} if departs else {}
        if looks:
            whole = mix.along is None and step == record.step_size
            news["secants"] = Secants(paced.policy.c).commit(found.seen, point, record, searched, whole)
        news["stiffness"] = stiffness.seen(states["stiffness"], told.hessian, float(point.scale.state.previous))
        news["retreat"] = self._retreat.commit(point, paced.before, states["retreat"], told.hessian, self.lower.limit)
        if moved:
            path.take(step, mix.along)
        direction, messages = self._direction(), list[str]()
        news |= {
            "check": roles.check.commit(point, check, states["check"]),
            "pace": roles.pace.commit(paced, record, states["pace"]),
            "direction": direction.commit(path.gradient, path.descent, states["direction"]),
            "momentum": roles.momentum.commit(context, mix, states["momentum"]),
        }
        if answer is not None:
            comparable = answer.comparable and not getattr(point.objective, "rescaled", False)
            solver = getattr(roles.response, "solver", None)
            taken = Taken(record, comparable, solver, told.hessian, point.value, change, gain)
            messages = roles.diagnosis.propose(taken, states["diagnosis"])
            news["diagnosis"] = roles.diagnosis.commit(taken, messages, states["diagnosis"])
            news["response"] = answer.state
        if told.offsets is not None or (answer is None and visible(step * path.promised, point.value, point.rounding)):
            place = (path.promised, mix, point.beta, self.lower, path.gradient, step if moved else 0.0, along)
            known = PredictionContext(told.offsets, *place, told.curvature, told.share)
            news["prediction"] = predicted(roles.prediction, known, states["prediction"])
            del place, known
        if moved:
            self.lower.upper_moved()
        path.release()
        states.clear()
        del mix, context, along  # what is written takes the place of what these hold
        write_states(self.state, news, path.gradient.tensors)
        if moved or record.trials > 1:
            after = shortened(found.state, step / record.step_size) if moved else point.scale.state
            self._save_rule_state(after, **point.scale.after(record, self.policy, point.value, point.rounding, excused))
        return messages
