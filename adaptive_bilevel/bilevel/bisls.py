"""BiSLS: a line search at the upper level of a bilevel problem, for code that computes hypergradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import LowerLevelError, OptionError, warn
from ..evaluation.closures import require_closure
from ..evaluation.guard import Closure, Guard
from ..evaluation.reductions import agree
from ..evaluation.tensors import gradients_of
from ..evaluation.vectors import inner
from ..hypergradient import CG, LinearSolver
from ..optim.direction import Descent, Direction
from ..optim.options import Conduct, placeholder
from ..optim.projection import Projection, Section, as_projection
from ..optim.search_path import Move
from ..policies import Outcome, Record, validation
from ..policies.scalars import resolution
from .model_check import Belief
from .momentum import blended, blended_tangent
from .response import NoResponse, Response, StepResponse, TangentResponse, is_blind
from .sample_support import Coverage, coverage
from .upper import UpperOptimizer

__all__ = ["BiSLS"]

RESPONSES = ("tangent", "step")
BASELINES = ("paper", "matched")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    c: float | None
    momentum: str | bool | None
    response: str
    carry: str | bool
    curvature: float
    baseline: str
    response_steps: int


class BiSLS(UpperOptimizer):
    """BiSLS: a line search at the upper level, for code that already computes hypergradients.

    `.grad` of the upper parameters holds the hypergradient h when ``step(upper_closure)`` is called. The step searches
    the largest tried a with phi(a) <= f(x, y) - c a s (+ slack), along d = h or Adam's A^{-1} h, where phi(a) =
    f(x - a d, y + a w) follows the lower solution along its tangent: w = P C^T d, s = <f_x, d> - <f_y, w>.

    Args:
        params: Upper parameters or groups.
        lr: The first trial of the first search, > 0. Left out: (f - lower_bound)/(c s), the longest step that could
            pass; it caps every later search too.
        lower: The optimizer of the lower level (any torch optimizer), a list of them (several children, a meta-batch of
            tasks), or None if f does not depend on a lower variable.
        direction: "sgd", "adam" (BiSLS-Adam: search along A^{-1} h, step along A^{-1} m), or a `Direction` of yours.
        momentum: Whether the step is along the mean of the hypergradients (searched is always along the last one).
            "auto": as far as that mean predicts the next one, see `adaptive_bilevel.bilevel.momentum`. False: every
            step is one that the search has certified, so that F cannot rise where y and the hypergradient are exact.
            Left out: "auto"; with response="step" as in the paper, True for "adam" and False for "sgd".
        response: "tangent", or "step": one more lower step per trial, as in Fan et al. (2023), eq. (14).
        solver: P of the tangent; give the one that the hypergradient uses. For `Identity` and a random draw, which do
            not know how far they are from the inverse, P is `CG` instead where d descends along its tangent.
        carry: Whether y moves along to y + a w. "auto": it does, and the next lower step keeps that if the loss of its
            first sample is smaller there than at y, and than after a lower step from y; else it goes back to y (lower
            optimizers of this package; for others False).
        curvature: A step is also rejected if the lower gradient changed (smoothly) by more than
            curvature * a ||C^T d||, which it does where the tangent cannot be believed; with `CG`, unless f corrected
            for that change passes the test of decrease too. Where a sample knows a part of x only, it counts for less
            (`adaptive_bilevel.bilevel.sample_support`). inf: no such test. See `adaptive_bilevel.bilevel.model_check`.
        project: Convex set for x: `Box`, `Ball`, `Simplex` or a callable. A start outside of it is projected first, the
            search stays in it, and parameters that do not move (frozen, without a .grad, lr of 0) stay as they are.
        c: Armijo constant, in (0, 1). Left out: .1; .5 for "sgd" with momentum=False and response="tangent".
        shrink: w, factor between two trials, in (0, 1).
        grow: eta >= 1, how much longer than the last step the next search starts (reset="grow"); until a trial has been
            rejected, 1/shrink (not with response="step").
        reset: "initial", "keep" or "grow" (options 1, 2, 3 of Algorithm 3).
        slack: delta >= 0, an allowed increase.
        lower_bound: Any lower bound of f; None if there is none (then give lr).
        max_step: No trial is above it. With response="step" lr is such a cap, as in the paper.
        max_trials: Trials before a search has failed; None: until 1e-12 of the first trial.
        baseline: With response="step": "paper" compares with f(x, y), "matched" with phi(0).
        response_steps: With response="step": lower steps per trial.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).
        TensorError: Upper and lower parameters share a tensor, or one is sparse or complex.
    """

    mixes_momentum = True
    parts: _Parts

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        lower: Any = None,
        direction: str | Direction = "sgd",
        momentum: str | bool | None = None,
        response: str = "tangent",
        solver: LinearSolver | None = None,
        carry: str | bool = "auto",
        curvature: float = 0.5,
        project: Projection | None = None,
        c: float | None = None,
        shrink: float = 0.5,
        grow: float = 1.2,
        reset: str = "grow",
        slack: float = 0.0,
        lower_bound: float | None = 0.0,
        max_step: float | None = None,
        max_trials: int | None = None,
        baseline: str = "paper",
        response_steps: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        validation.choice("BiSLS", "response", response, RESPONSES)
        validation.choice("BiSLS", "baseline", baseline, BASELINES)
        validation.count("BiSLS", "response_steps", response_steps)
        validation.positive("BiSLS", "curvature", curvature)
        validation.positive("BiSLS", "max_step", max_step, optional=True)
        validation.finite("BiSLS", "lower_bound", lower_bound, optional=True)
        for name, value in (("carry", carry), ("momentum", momentum)):
            if not (isinstance(value, bool) or value == "auto" or (name == "momentum" and value is None)):
                raise OptionError(f"BiSLS({name}={value!r}): {name} must be 'auto', True or False")
        self.solver: LinearSolver = CG() if solver is None else solver
        if isinstance(solver, type) or not callable(getattr(self.solver, "solve", None)):
            raise OptionError(f"BiSLS(solver={solver!r}): solver must be CG(...), Neumann(...) or Identity(...)")
        self.project = as_projection("BiSLS", project)
        parts = _Parts(
            c=c,
            momentum=momentum,
            response=response,
            carry=carry,
            curvature=curvature,
            baseline=baseline,
            response_steps=response_steps,
        )
        rule = policies.SLS(
            start=placeholder(lower_bound),
            c=0.1 if c is None else c,
            shrink=shrink,
            grow=grow,
            reset=reset,
            slack=slack,
            lower_bound=lower_bound,
            max_step=max_step,
            max_trials=max_trials,
        )
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct, parts=parts)
        self.bind(lower)

    def _refuse_unused(self) -> None:
        pass

    def _check_lr(self, lr: Any) -> None:
        validation.positive("BiSLS", "lr", lr, optional=True, below_infinity=True)

    def bind(self, lower: Any) -> None:
        """Set the lower optimizers."""
        super().bind(lower)
        known: dict[Any, Any] = self.state  # torch types the keys as tensors
        shapes = [p.shape for p in self.lower.tensors()]
        if "tangents" in known and [t.shape for t in known["tangents"]["mean"]] != shapes:
            del known["tangents"]

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        return {**super().__getstate__(), "solver": self.solver, "project": self.project}

    def _make_policy(self, rule: policies.SLS) -> Any:
        c, step = self.parts.c, self.parts.response == "step"
        if c is None:
            kind = getattr(self.conduct.direction, "kind", self.conduct.direction)
            c = 0.5 if kind == "sgd" and not step and not _momentum(self) else 0.1
        if step:
            # The searched function has not the slope of the hypergradient, so no step can be excluded beforehand.
            names = ("shrink", "grow", "reset", "slack", "max_trials")
            shared = {name: getattr(rule, name) for name in names}
            return policies.SLSB(bound=1.0, decay="constant", lower_bound=None, c=c, **shared)
        return dataclasses.replace(rule, c=c)

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
        upper_closure = require_closure("BiSLS", upper_closure)
        params, lower = self._parameters(), self.lower.tensors()
        hypergradient = self._hypergradient(params)
        with Guard([*params, *lower], self._workspace) as guard:
            active, h, factors = self._with_gradient(params, hypergradient)
            section = None if self.project is None else Section.of(self.project, params, active, factors)
            if section is not None:
                section.enter(guard, params)
            loss, found = self._partials(guard, upper_closure, [*params, *lower])
            guard.mark()
            going, descent = self._move_along(active, h, factors)
            value = float(agree(loss)[0])
            covered = self._coverage(params, hypergradient)
            record, state, tangent = self._refuse(value, going.promised), self._rule_state(), None
            if record is None and self._unresolved(loss, value, going.promised):
                going, _ = self._feasible(params, section, going, value)
                step = min(state.previous, going.longest, self.rule.max_step or math.inf)
                record = Record(step, step, going.longest, Outcome.accepted, slope=going.promised)
            elif record is None:
                f_x = gradients_of(active, params, found[: len(params)])
                partials = f_x, gradients_of(lower, lower, found[len(params) :])
                del found, f_x
                going, limits = self._feasible(params, section, going, value)
                record = self._refuse_cut(value, loss, going)
            if record is None:
                response = self._respond(guard, lower_closure, lower, partials, going, self._belief(covered))
                ratio = response.slope / going.promised if going.promised else math.nan
                del partials
                if isinstance(response, TangentResponse):
                    while response.slope <= 0.0 and response.refine():
                        # The hypergradient does not descend on phi: take the one of the response's solver.
                        own = self._processed(active, response.hypergradient())
                        going, descent = self._move_along(active, own, factors)
                        going, limits = self._feasible(params, section, going, value)
                        response.along(going.along)
                    response.close()
                record, state = self._search(guard, upper_closure, going, response, value, loss, limits)
                record = record._replace(slope=response.slope, slope_ratio=ratio)
                tangent = response.offsets
                del response
            guard.put_back()
            if record.outcome == Outcome.non_finite:
                guard.undo()
            elif record.outcome != Outcome.zero_gradient:
                if record.moved:
                    going.take(record.step_size)
                    self._save_rule_state(state)
                covered.commit()
                answer, commit = self._answer(tangent, going, descent), descent.commit
                del covered, tangent, going, descent  # what is committed takes their place
                commit()
                if record.moved:
                    self._carry(lower, answer, record.step_size)
        if record.trials > 1 and not self._saved("rejected", False):
            self._save_rule_state(self._rule_state(), rejected=True)
        self._conclude(record, state)
        self._compare_slopes(record)
        return loss

    # ------------------------------------------------------------------------------------------ parts of a step

    def _partials(
        self, guard: Guard, upper_closure: Closure, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return f(x, y) and its partial gradients."""
        self.evaluations.upper.gradients += 1
        return guard.gradient(upper_closure, tensors)

    def _move_along(self, active: list[Tensor], h: Sequence[Tensor], factors: Sequence[float]) -> tuple[Move, Descent]:
        """Return the move along the preconditioned h; a group's lr counts as a part of its direction."""
        descent, step = self._descent(active, h), None
        momentum = _momentum(self)
        if momentum is not False:
            weight = 1.0 if momentum is True else None
            beta = self.param_groups[0]["betas"][0]
            descent, step = blended(descent, active, h, factors, self.state, beta, weight=weight)
        elif descent.step is not None:
            step = descent.step.copy
        along = _scaled(descent.precondition(h), factors)
        stepped = None if step is None else lambda: _scaled(step(), factors)
        return Move(active, list(h), along, stepped, mover=descent.move, factors=factors), descent

    def _processed(self, active: Sequence[Tensor], hypergradient: list[Tensor]) -> list[Tensor]:
        """Return a hypergradient of the solver's as whoever steps would have changed the user's."""
        return hypergradient

    def _refuse(self, value: float, promised: float) -> Record | None:
        """Return the record of a step that is not even tried, or None."""
        if not (math.isfinite(value) and math.isfinite(promised)):
            return Record(0.0, 0.0, math.inf, Outcome.non_finite, slope=promised)
        if promised <= 0.0:
            # Negative only for directions of others (a momentum): the next one may descend, since memory goes on.
            outcome = Outcome.zero_gradient if promised == 0.0 else Outcome.no_descent
            return Record(0.0, 0.0, math.inf, outcome, slope=promised)
        if self._reference_lr() == 0.0:
            return Record(0.0, 0.0, 0.0, Outcome.at_bound, slope=promised)
        return None

    def _refuse_cut(self, value: float, loss: Tensor, going: Move) -> Record | None:
        """Return the record of a step of which the set leaves nothing, or less than f could tell, or None."""
        if going.cut and abs(going.promised) * going.longest <= max(resolution(loss) * abs(value), going.rounding):
            return Record(0.0, 0.0, math.inf, Outcome.zero_gradient, slope=going.promised)
        return self._refuse(value, going.promised)

    def _unresolved(self, loss: Tensor, value: float, promised: float) -> bool:
        """Return whether what the last step length promises is lost in the rounding of f: no trial could tell.

        So it is at a solution. The step is then taken as long as the last one that told; solves would be for slopes of
        either sign, and steps would grow or shrink by chance. Not before a trial has been rejected: first steps may be
        that short by choice.
        """
        if self.parts.response != "tangent" or not self._saved("rejected", False):
            return False
        gain = float(self._rule_state().previous) * promised
        return 0.0 < gain < resolution(loss) * abs(value)

    def _respond(
        self,
        guard: Guard,
        lower_closure: Any,
        lower: list[Tensor],
        partials: tuple[list[Tensor], list[Tensor]],
        going: Move,
        belief: Belief,
    ) -> Response:
        """Return the lower level's response to the move."""
        parts, counts = self.parts, self.evaluations.lower
        if not self.lower:
            if parts.response == "step":
                raise LowerLevelError(
                    "BiSLS(lower=None, response='step'): the trial takes lower steps; pass lower= the lower optimizer"
                )
            if all(not bool(g.any()) for g in partials[0]):
                raise LowerLevelError(
                    "BiSLS(lower=None): the upper loss does not depend on the upper parameters directly, so the search "
                    "needs the lower level's response; pass lower= the lower optimizer"
                )
            return NoResponse(float(agree(inner(partials[0], going.along))[0]))
        samples = self.lower.samples(lower_closure, guard)
        if parts.response == "step":
            return StepResponse(guard, samples, lower, going.promised, parts.response_steps, counts)
        response = TangentResponse(guard, samples, going.tensors, lower, partials, self.solver, belief, counts)
        response.along(going.along)
        return response

    def _coverage(self, params: Sequence[Tensor], hypergradient: Sequence[Tensor | None]) -> Coverage:
        """Return what the hypergradient covers of what may move."""
        if self.parts.response != "tangent" or not self.lower or math.isinf(self.parts.curvature):
            return Coverage(1.0, lambda: None)
        moves = [factor != 0.0 and p.requires_grad for factor, p in zip(self._each_factor(), params, strict=True)]
        return coverage(list(compress(params, moves)), list(compress(hypergradient, moves)), self.state)

    def _belief(self, covered: Coverage) -> Belief:
        return Belief(self.parts.curvature / covered.share, resumed=self._rule_state().previous > 0.0)

    def _limits(self, value: float, slope: float) -> tuple[Any, dict[str, Any]]:
        """Return the rule's state, and what it is told of its first trial."""
        state, (given, scale) = self._rule_state(), self._bound()
        bound = {"scale": scale} if given is None else {"bound": given}
        if self.parts.response == "step" and "scale" in bound:
            low = self.rule.lower_bound
            found = state.found or max(0.0, policies.armijo_ceiling(value, slope, low, self._searching(state).c))
            state, bound = state._replace(found=found), {"bound": bound["scale"] * found}
        return state, bound

    def _feasible(
        self, params: list[Tensor], section: Section | None, going: Move, value: float
    ) -> tuple[Move, tuple[Any, dict[str, Any]]]:
        """Return the move that stays in the convex set, if there is one, and the limits of its search."""
        state, bound = self._limits(value, going.promised)
        if section is not None:
            longest = self._searching(state).first_trial(state, loss=value, slope=going.promised, **bound)
            if math.isfinite(longest) and longest > 0.0:
                going = going.within(params, section, longest)
        return going, (state, bound)

    def _search(
        self,
        guard: Guard,
        upper_closure: Closure,
        going: Move,
        response: Response,
        value: float,
        loss: Tensor,
        limits: tuple[Any, dict[str, Any]],
    ) -> tuple[Record, Any]:
        there = math.nan

        def place(step: float) -> None:
            guard.put_back()
            going.go(step)
            response.answer(step)

        def trial(step: float) -> float:
            nonlocal there
            place(step)
            self.evaluations.upper.values += 1
            there = float(agree(guard.value(upper_closure, guard.entry))[0])
            return there

        def certify(step: float) -> bool:
            limits = {"c": policy.c, "slack": policy.slack, "rounding": rounding}
            asked = policies.armijo_threshold(value, response.slope, step, **limits)
            return response.certify(step, asked - there, place)

        guard.copy()
        state, bound = limits
        policy, rounding = self._searching(state), resolution(loss)
        extra: dict[str, Any]
        if self.parts.response == "step":
            extra = {"rounding": 0.0}  # as in the paper, to the bit
            bound = {"bound": min(bound["bound"], going.longest)}
            if self.parts.baseline == "matched":
                value = trial(0.0)
        else:
            most = self.rule.max_step
            longest = going.longest if most is None else min(going.longest, most)
            extra = {"rounding": rounding, "certify": certify, "cap": longest}
        context = policies.Context(value, response.slope, trial, **bound, **extra)
        searched: tuple[Record, Any] = policy.propose(state, context)
        return searched

    def _searching(self, state: Any) -> Any:
        """Return the policy, as it is until its first steps have told the scale.

        The first search takes no step beyond the minimizer of its own quadratic model, which is Armijo's test with
        c = 1/2 (or above): Adam's first direction has entries of size 1 all over and no scale; where x saturates
        (weights behind a sigmoid), what one step too long did is not undone by the next. And until a trial has been
        rejected, nothing is known of what is too long, so searches start at 1 / shrink times the last step at least.
        """
        policy: Any = self.policy
        if self.parts.response != "tangent":
            return policy
        if state.previous == 0.0:
            policy = dataclasses.replace(policy, c=max(policy.c, 0.5))
        if not self._saved("rejected", False):
            policy = dataclasses.replace(policy, grow=max(policy.grow, 1.0 / policy.shrink))
        return policy

    def _answer(self, tangent: Sequence[Tensor] | None, going: Move, descent: Descent) -> list[Tensor] | None:
        """Return how y answers to one unit of the step that is taken; None: not known, or nobody's to take."""
        carry = self.parts.carry
        if tangent is None or carry is False or (carry == "auto" and not self.lower.takes_offers):
            return None
        tangent = list(tangent)
        if _momentum(self) is False:
            return tangent
        weight = 0.0 if going.stepped is None else descent.weight
        beta = self.param_groups[0]["betas"][0]
        return blended_tangent(tangent, self.state, beta, weight=weight, restarted=descent.restarted)

    def _carry(self, lower: list[Tensor], answer: list[Tensor] | None, step: float) -> None:
        """Take the predicted response into the next lower loop, or offer it to that loop."""
        if answer is None:
            return
        if self.parts.carry is True:
            torch._foreach_add_(lower, answer, alpha=step)
        else:
            self.lower.predict(torch._foreach_mul(answer, step))

    def _compare_slopes(self, record: Record) -> None:
        """Say once when the slope has been far from what the hypergradient promised for 20 steps in a row."""
        if not math.isfinite(record.slope_ratio) or self.parts.response == "step" or is_blind(self.solver):
            return
        self._far = self._far + 1 if not 0.5 <= record.slope_ratio <= 2.0 else 0
        if self._far == 20:
            warn(
                f"BiSLS: for 20 steps the searched function's slope was far from <hypergradient, direction> (ratio now "
                f"{record.slope_ratio:.3g}): .grad and {self.solver} disagree. Check the hypergradient with "
                "adaptive_bilevel.hypergradient.check, give BiSLS the solver that it uses, or solve further"
            )

    _far = 0


def _momentum(optimizer: BiSLS) -> Any:
    """Return "auto", True or False; a direction of the user's brings its own momentum."""
    direction, chosen = optimizer.conduct.direction, optimizer.parts.momentum
    if callable(direction):
        return False
    if chosen is None:
        return direction == "adam" if optimizer.parts.response == "step" else "auto"
    return chosen


def _scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    return [t if w == 1.0 else t * w for t, w in zip(tensors, factors, strict=True)]
