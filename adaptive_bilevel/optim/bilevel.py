"""BiSPS and BiSLS: the upper level of a bilevel problem, for code that computes hypergradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import AdaptiveBilevelWarning, HypergradientError, LowerLevelError, OptionError
from ..hypergradient import CG, Identity, LinearSolver
from ..policies import Outcome, Record, _options
from ..policies.schedule import Decay
from .base import AdaptiveOptimizer, move, require_closure, slope_of
from .evaluations import Evaluations
from .guard import Closure, Guard
from .lower import LowerLevel
from .polyak import PolyakOptimizer
from .projection import Projection, as_projection
from .response import NoResponse, Response, StepResponse, TangentResponse
from .scalars import agree, loss_resolution

__all__ = ["BiSLS", "BiSPS"]

RESPONSES = ("tangent", "step")
BASELINES = ("paper", "matched")


def _hypergradient(owner: str, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return .grad of the upper parameters, which must have been set."""
    grads = [p.grad for p in params]
    if all(g is None for g in grads):
        raise HypergradientError(
            f"{owner}.step: .grad of all {len(params)} upper parameters is None. Put the hypergradient there first, e.g. "
            "by adaptive_bilevel.hypergradient.implicit, and do not call zero_grad in between"
        )
    return grads


class BiSPS(PolyakOptimizer):
    """BiSPS: alpha_k = min{max{alpha_l,k, (f - lower_bound) / (c ||h||^2)}, alpha_b,k}, x <- x - alpha_k h, eq. (12).

    `.grad` of the upper parameters holds the hypergradient h when `step` is called.

    Args:
        params: Upper parameters or groups.
        lr: alpha_b,0 > 0, the bound. Left out, it is found at the first step.
        lr_min: alpha_l,0 >= 0, the floor; it decays like the bound.
        lower: The lower optimizer, or a list; if it is a Polyak rule of this package, its bound beta_b,k decays with
            the upper iterations and is constant within one.
        c: c > 0.
        lower_bound: A lower bound of f over both variables, e.g. 0. (A bound for the present y makes every step 0.)
        decay: Schedule of bound and floor.
        direction: "sgd" or "adam".
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).
        TensorError: Upper and lower parameters share a tensor, or one is sparse or complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        lr_min: float = 0.0,
        lower: Any = None,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "inverse_sqrt",
        direction: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        excluded = ("self", "params", "lr", "lower", "__class__")
        super().__init__(params, lr, {name: value for name, value in locals().items() if name not in excluded})
        self.bind(lower)

    def bind(self, lower: Any) -> None:
        """Set the lower optimizers."""
        self.lower = LowerLevel(lower, self._parameters())
        for optimizer in self._clocked():
            optimizer.set_clock(max(optimizer.clock, 0))

    def _clocked(self) -> list[PolyakOptimizer]:
        return [o for o in self.lower.optimizers if isinstance(o, PolyakOptimizer)]

    def _make_policy(self, options: dict[str, Any]) -> policies.Envelope:
        _options.non_negative("BiSPS", "lr_min", options["lr_min"])
        return policies.Envelope(
            c=options["c"],
            lower_bound=options["lower_bound"],
            decay=options["decay"],
            floor=options["lr_min"],
            floor_decay=options["decay"],
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss: Tensor | float | None = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Take one upper step along .grad, and return the upper loss before it.

        Args:
            closure: Returns the upper loss f(x, y) on the sample of the hypergradient; evaluated once, no gradients.
            loss: In the place of a closure: that loss.
            lower_bound: Overrides the option for this sample.

        Raises:
            HypergradientError: No upper parameter has a .grad.
            ClosureError: Neither closure nor loss.
            NonFiniteError: max_skips steps in a row were not finite.
        """
        params = self._parameters()
        grads = _hypergradient("BiSPS", params)
        with Guard(params, self._workspace) as guard:
            if loss is None:
                require_closure("BiSPS", closure)
                assert closure is not None
                value = guard.value(closure)
                self.evaluations.upper.values += 1
            else:
                value = loss.detach() if isinstance(loss, Tensor) else float(loss)
            active, gradient, factors = self._with_gradient(params, grads)
            record, scale = self._polyak_step(active, gradient, factors, gradient, value, lower_bound)
            if not isinstance(record.outcome, Tensor) and record.outcome == Outcome.non_finite:
                guard.undo()
        for optimizer in self._clocked():
            optimizer.set_clock(optimizer.clock + 1)
        self._conclude(record, scale)
        return value


class BiSLS(AdaptiveOptimizer):
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
        direction: "sgd" or "adam" (BiSLS-Adam: search along A^{-1} h, step along A^{-1} m).
        response: "tangent", or "step": one more lower step per trial, as in Fan et al. (2023), eq. (14).
        solver: P of the tangent; give the one that the hypergradient uses.
        carry: Whether y + a w becomes the start of the next lower loop. "auto": the next lower step decides, by the
            loss of its own first sample (lower optimizers of this package; for others False).
        curvature: A step is also rejected if the lower gradient changed by more than curvature * a ||C^T d||, which it
            does where the tangent cannot be believed; inf: no such test.
        project: Convex set for x: `Box`, `Simplex` or a callable; the search stays in it.
        c: Armijo constant, in (0, 1).
        shrink: w, factor between two trials, in (0, 1).
        grow: eta >= 1, how much longer than the last step the next search starts (reset="grow").
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

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        lower: Any = None,
        direction: str = "sgd",
        response: str = "tangent",
        solver: LinearSolver | None = None,
        carry: str | bool = "auto",
        curvature: float = 0.5,
        project: Projection | None = None,
        c: float = 0.5,
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
        excluded = ("self", "params", "lr", "lower", "solver", "project", "__class__")
        options = {name: value for name, value in locals().items() if name not in excluded}
        _options.choice("BiSLS", "response", response, RESPONSES)
        _options.choice("BiSLS", "baseline", baseline, BASELINES)
        _options.count("BiSLS", "response_steps", response_steps)
        _options.positive("BiSLS", "curvature", curvature)
        if carry not in ("auto", True, False):
            raise OptionError(f"BiSLS(carry={carry!r}): carry must be 'auto', True or False")
        self.solver: LinearSolver = CG() if solver is None else solver
        if not callable(getattr(self.solver, "solve", None)):
            raise OptionError(f"BiSLS(solver={solver!r}): solver must be CG(...), Neumann(...) or Identity(...)")
        self.project = as_projection("BiSLS", project)
        super().__init__(params, lr, options)
        self.bind(lower)
        self.evaluations = Evaluations()
        if response == "tangent" and isinstance(self.solver, Identity):
            warnings.warn(
                "BiSLS(solver=Identity(...), response='tangent'): the identity is no inverse of the lower Hessian, so "
                "the predicted response is poor and steps will be short. Prefer CG() or Neumann(...), or "
                "response='step', baseline='matched', response_steps= the lower steps per upper iteration",
                AdaptiveBilevelWarning,
                stacklevel=2,
            )

    def bind(self, lower: Any) -> None:
        """Set the lower optimizers."""
        self.lower = LowerLevel(lower, self._parameters())
        if self._options["response"] == "step" and not self.lower:
            raise LowerLevelError("BiSLS(lower=None, response='step'): the trial takes lower steps; pass lower=optimizer")

    def _make_policy(self, options: dict[str, Any]) -> Any:
        names = ("c", "shrink", "grow", "reset", "slack", "max_trials")
        shared = {name: options[name] for name in names}
        if options["response"] == "step":
            # The searched function has not the slope of the hypergradient, so no step can be excluded beforehand.
            return policies.SLSB(bound=1.0, decay="constant", lower_bound=None, **shared)
        start = 1.0 if options["lower_bound"] is None else None
        return policies.SLS(
            start=start, lower_bound=options["lower_bound"], max_step=options["max_step"], **shared
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, upper_closure: Closure, lower_closure: Closure | Sequence[Closure] | None = None
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
        require_closure("BiSLS", upper_closure)
        params, lower = self._parameters(), self.lower.tensors()
        hypergradient = _hypergradient("BiSLS", params)
        with Guard([*params, *lower], self._workspace) as guard:
            loss, partials = guard.gradient(upper_closure, [*params, *lower])
            self.evaluations.upper.gradients += 1
            guard.mark()
            active, h, factors = self._with_gradient(params, hypergradient)
            descent = self._descent(active, h)
            direction = _scaled(descent.precondition(h), factors)
            stepped = None if descent.step is None else _scaled(descent.step, factors)
            value, promised = (float(v) for v in agree(loss, slope_of(h, direction, [1.0] * len(h))))
            record: Record | None = None
            scale: Any = self.param_groups[0]["scale"]
            response: Response | None = None
            tangents: dict[str, Any] | None = None
            if not (math.isfinite(value) and math.isfinite(promised)) or promised <= 0.0:
                outcome = Outcome.non_finite if not math.isfinite(value + promised) else Outcome.zero_gradient
                record = Record(0.0, 0.0, math.inf, outcome, slope=promised)
            elif self._reference_lr() == 0.0:
                record = Record(0.0, 0.0, 0.0, Outcome.at_bound, slope=promised)
            else:
                f_x = [torch.zeros_like(p) if g is None else g for p, g in zip(params, partials, strict=False)]
                f_y = [torch.zeros_like(p) if g is None else g for p, g in zip(lower, partials[len(params) :], strict=True)]
                chosen = {id(p): g for p, g in zip(params, f_x, strict=True)}
                copies = guard.copy()
                longest = math.inf
                if self.project is not None:
                    direction, longest = self._feasible(guard, params, active, direction, value, promised)
                    promised = float(agree(slope_of(h, direction, [1.0] * len(h)))[0])
                response = self._respond(
                    guard, lower_closure, active, lower, direction, ([chosen[id(p)] for p in active], f_y), promised
                )
                if isinstance(response, TangentResponse):
                    response.along(direction)
                    if response.slope <= 0.0 and self.project is None:
                        # The hypergradient does not descend on phi, solved further or not: replace it by its own.
                        h = response.hypergradient()
                        direction = _scaled(descent.precondition(h), factors)
                        promised = float(agree(slope_of(h, direction, [1.0] * len(h)))[0])
                        response.along(direction)
                    tangents = self._mean_tangent(response.offsets)
                response.close()
                record, scale, state = self._search(guard, upper_closure, active, direction, response, value, loss, longest)
            if response is not None:
                record = record._replace(slope=response.slope, slope_ratio=response.slope / promised if promised else math.nan)
            if record.outcome == Outcome.non_finite:
                guard.undo()
            else:
                descent.commit()
                if tangents is not None:
                    self.state["tangents"] = tangents  # type: ignore[index]
                if not record.moved:
                    guard.put_back()
                else:
                    assert response is not None
                    self._settle(params, lower, active, stepped, response.offsets, tangents, record.step_size, copies)
                    self._save_rule_state(state)
        self._conclude(record, scale)
        self._compare_slopes(record)
        return loss

    # ------------------------------------------------------------------------------------------ parts of a step

    def _respond(
        self,
        guard: Guard,
        lower_closure: Any,
        active: list[Tensor],
        lower: list[Tensor],
        direction: list[Tensor],
        partials: tuple[list[Tensor], list[Tensor]],
        promised: float,
    ) -> Response:
        options = self._options
        if not self.lower:
            slope = float(agree(slope_of(partials[0], direction, [1.0] * len(direction)))[0])
            if all(not bool(g.any()) for g in partials[0]):
                raise LowerLevelError(
                    "BiSLS(lower=None): the upper loss does not depend on the upper parameters directly, so the search "
                    "needs the lower level's response; pass lower= the lower optimizer"
                )
            return NoResponse(slope)
        samples = self.lower.samples(lower_closure, guard)
        if options["response"] == "step":
            return StepResponse(guard, samples, lower, promised, options["response_steps"], self.evaluations.lower)
        return TangentResponse(
            guard,
            samples,
            active,
            lower,
            partials,
            self.solver,
            options["curvature"],
            self.evaluations.lower,
        )

    def _search(
        self,
        guard: Guard,
        upper_closure: Closure,
        active: list[Tensor],
        direction: list[Tensor],
        response: Response,
        value: float,
        loss: Tensor,
        longest: float,
    ) -> tuple[Record, Any, Any]:
        def trial(step: float) -> float:
            guard.put_back()
            move(active, direction, step, [1.0] * len(active))
            response.answer(step)
            self.evaluations.upper.values += 1
            return float(agree(guard.value(upper_closure, guard.entry))[0])

        bound, scale = self._bound(value, response.slope, None)
        arguments: dict[str, Any] = {}
        if self._options["response"] == "step":
            arguments = {"rounding": 0.0}  # as in the paper, to the bit
            if self._options["baseline"] == "matched":
                value = trial(0.0)
        else:
            most = self._options["max_step"]
            arguments = {"certify": response.certify, "max_step": min(longest, math.inf if most is None else most)}
        record, state = self._policy.step(
            self._rule_state(),
            loss=value,
            slope=response.slope,
            trial=trial,
            bound=bound or None,
            **{"rounding": loss_resolution(loss), **arguments},
        )
        return record, scale, state

    def _bound(self, loss: Any, slope: Any, lower_bound: float | None) -> tuple[Any, Any]:
        scale = self.param_groups[0]["scale"]
        if scale == 0.0:
            finder = policies.SLS(c=self._options["c"], lower_bound=self._options["lower_bound"])
            scale = finder.first_bound(loss=loss, slope=slope)
        return self._reference_lr() * scale, scale

    def _feasible(
        self,
        guard: Guard,
        params: list[Tensor],
        active: list[Tensor],
        direction: list[Tensor],
        value: float,
        promised: float,
    ) -> tuple[list[Tensor], float]:
        """Return the feasible direction (x - P(x - a d)) / a for the longest step a to be tried, and a.

        Steps up to a along it stay in the convex set, so the tangent is needed for one direction only, and the test of
        sufficient decrease is that of the projected displacement.
        """
        assert self.project is not None
        bound, _ = self._bound(value, promised, None)
        longest = self._policy.first_trial(self._rule_state(), loss=value, slope=promised, bound=bound or None)
        if not (math.isfinite(longest) and longest > 0.0):
            return direction, math.inf
        move(active, direction, longest, [1.0] * len(active))
        self.project(params)
        by_id = {id(p): c for p, c in zip(params, guard.copy(), strict=False)}
        feasible = [(by_id[id(p)] - p) / longest for p in active]
        guard.put_back()
        return feasible, longest

    def _mean_tangent(self, offsets: Sequence[Tensor] | None) -> dict[str, Any] | None:
        """Return the running mean of the tangents, averaged as Adam averages the gradients; None for plain steps.

        The step goes along the mean of the gradients, so y answers along the mean of the tangents. That would cost a
        second solve; the mean of the solves made so far is free, and differs by how H, C and A changed meanwhile.
        """
        if self._options["direction"] != "adam" or offsets is None:
            return None
        beta = self._options["betas"][0]
        saved = self.state["tangents"] if "tangents" in self.state else {"count": 0, "mean": None}
        mean = list(offsets) if saved["mean"] is None else saved["mean"]
        if saved["mean"] is None:
            mean = list(torch._foreach_mul(mean, 1.0 - beta))
        else:
            mean = list(torch._foreach_lerp(mean, list(offsets), 1.0 - beta))
        return {"count": saved["count"] + 1, "mean": mean}

    def _settle(
        self,
        params: list[Tensor],
        lower: list[Tensor],
        active: list[Tensor],
        stepped: list[Tensor] | None,
        offsets: Sequence[Tensor] | None,
        tangents: dict[str, Any] | None,
        step: float,
        copies: list[Tensor],
    ) -> None:
        """Put x where the step leads, and y where it is carried to."""
        if stepped is not None:
            by_id = {id(p): c for p, c in zip(params, copies, strict=False)}
            torch._foreach_copy_(active, [by_id[id(p)] for p in active])
            move(active, stepped, step, [1.0] * len(active))
        if self.project is not None:
            self.project(params)
        if not lower:
            return
        torch._foreach_copy_(lower, copies[len(params) :])
        if offsets is None or self._options["carry"] is False:
            return
        answer = list(offsets)
        if tangents is not None:
            step /= 1.0 - self._options["betas"][0] ** tangents["count"]
            answer = tangents["mean"]
        if self._options["carry"] == "auto":
            self.lower.offer(torch._foreach_mul(answer, step))
        else:
            torch._foreach_add_(lower, answer, alpha=step)

    def _compare_slopes(self, record: Record) -> None:
        """Say once when the slope has been far from what the hypergradient promised for 20 steps in a row."""
        if not math.isfinite(record.slope_ratio) or self._options["response"] == "step":
            return
        self._far = self._far + 1 if not 0.5 <= record.slope_ratio <= 2.0 else 0
        if self._far == 20:
            warnings.warn(
                f"BiSLS: for 20 steps the searched function's slope was far from <hypergradient, direction> (ratio now "
                f"{record.slope_ratio:.3g}): .grad and {self.solver} disagree. Check the hypergradient with "
                "adaptive_bilevel.hypergradient.check, give BiSLS the solver that it uses, or solve further",
                AdaptiveBilevelWarning,
                stacklevel=3,
            )

    _far = 0


def _scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    return [t if w == 1.0 else t * w for t, w in zip(tensors, factors, strict=True)]
