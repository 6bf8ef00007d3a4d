"""SPS_max, DecSPS and SPSB as optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import ClosureError, OptionError
from ..evaluation.closures import require_closure, value_of
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.reductions import agree, on_host, on_host_with_inner
from ..evaluation.tensors import gradients_of, slope_of, tainted
from ..evaluation.vectors import on_cpu
from ..policies import Outcome, Record, Trial
from ..policies.schedule import Decay
from .base import AdaptiveOptimizer, Sample
from .direction import Descent, Direction
from .groups import options_of

__all__ = ["SPSB", "DecSPS", "SPSMax"]


class PolyakOptimizer(AdaptiveOptimizer):
    """The step that the Polyak rules share: no trial, and on an accelerator no wait for the device."""

    @property
    def clock(self) -> int:
        """The k of the bound's schedule if a level above sets it (beta_b,k of eq. (11)); -1: the own steps count."""
        return int(self._saved("clock", -1))

    def set_clock(self, k: int) -> None:
        """Set the k of the bound's schedule."""
        self._save_rule_state(self._rule_state(), clock=k)

    def _on_host(self, params: Sequence[Tensor]) -> bool:
        return on_cpu(params)

    def _polyak_step(
        self,
        active: Sequence[Tensor],
        gradient: Sequence[Tensor],
        factors: Sequence[float],
        rule_gradient: Sequence[Tensor],
        loss: Tensor | float,
        lower_bound: float | None,
        sample: tuple[Guard, Closure, RandomState] | None = None,
    ) -> tuple[Record, Any]:
        """Take the step and return its record and the rule's state after it; a first bound is tried on the sample."""
        if lower_bound is None and self._options["lower_bound"] is None:
            raise OptionError(
                f"{type(self).__name__}(lower_bound=None): the rule needs a lower bound of the loss; give one to the "
                "optimizer or to step(lower_bound=...), or use SLS for losses that are unbounded below"
            )
        descent = self._descent(active, gradient)
        value: Any
        slope: Any
        directions = descent.precondition(rule_gradient)
        if self._on_host(active):
            value, slope = on_host_with_inner(loss, rule_gradient, directions, factors)
        else:
            value, slope = agree(loss, slope_of(rule_gradient, directions, factors))
        state, clock = self._rule_state(), self.clock
        if clock >= 0:
            state = state._replace(count=clock)
        trial = None
        if sample is not None and self._seeks_bound():
            trial = self._trial(*sample, active, directions, descent, factors)
        record, state = self._policy.step(
            state, loss=value, slope=slope, lower_bound=lower_bound, trial=trial, **self._bound()
        )
        stepped = list(gradient) if descent.step is None else descent.step
        if isinstance(record.step_size, Tensor):
            _move_by_tensor(active, stepped, record.step_size, factors)
            self._save_rule_state(state, **({} if trial is None else {"tried": record.moved}))
            descent.commit((record.step_size > 0) | (record.outcome == int(Outcome.no_descent)))
        elif record.moved:
            descent.move(active, stepped, record.step_size, factors)
            self._save_rule_state(state)
            descent.commit()
        elif record.outcome == Outcome.no_descent:
            descent.commit()  # its memory has to turn, or nothing ever moves again
        return record, state

    def _seeks_bound(self) -> bool:
        """Return whether there was no step yet that could have found a bound."""
        if not self.param_groups[0]["automatic"] or self._saved("tried", False) or self._reference_lr() == 0.0:
            return False
        found = self._saved("found", 0.0)
        return isinstance(found, Tensor) or found == 0.0  # what is on a device is not read

    def _trial(
        self,
        guard: Guard,
        closure: Closure,
        random: RandomState,
        active: Sequence[Tensor],
        directions: Sequence[Tensor],
        descent: Descent,
        factors: Sequence[float],
    ) -> Trial:
        guard.mark()
        guard.copy()
        self._workspace.copies = []  # needed once only

        def trial(step: float) -> float:
            descent.move(active, directions, step, factors)
            self.evaluations.upper.values += 1
            value = on_host(guard.value(closure, random))[0]
            guard.put_back()
            return value

        return trial

    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss: Tensor | float | None = None,
        step_closure: Closure | None = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Take one step and return the loss before it.

        Args:
            closure: Returns the loss of one sample; evaluated once, with gradients. Where lr was left out, the first
                step also tries how long it may be: each trial is one more evaluation, without gradients.
            loss: In the place of a closure: the loss whose gradient is in ``.grad`` already.
            step_closure: The 2-sample form: loss and gradient of this closure give the step size, the gradient of
                `closure` the direction.
            lower_bound: Overrides the option for this sample.

        Raises:
            ClosureError: Neither closure nor loss, or the closure does not return an attached scalar.
            TensorError: A gradient is sparse.
            NonFiniteError: max_skips steps in a row were not finite.
        """
        owner = type(self).__name__
        lower_bound = self._sample_bound(lower_bound)
        params = self._parameters()
        with torch.no_grad(), Guard(params, self._workspace) as guard:
            grads: list[Tensor | None]
            evaluated, sample = None, None
            if loss is None:
                evaluated = require_closure(owner, closure)
                loss, grads = self._evaluate(guard, evaluated, params)
                sample = guard, evaluated, guard.entry
            else:
                loss, grads = _given(owner, closure, loss, [p.grad for p in params])
            active, gradient, factors = self._with_gradient(params, grads)
            rule_loss, rule_gradient = loss, gradient
            if step_closure is not None:
                sample = guard, require_closure(owner, step_closure), guard.random_state()
                rule_loss, rule_grads = guard.gradient(step_closure, params)
                self.evaluations.upper.gradients += 1
                rule_gradient = gradients_of(active, params, rule_grads)
                rule_loss = tainted(rule_loss, loss, gradient)
            record, state = self._polyak_step(active, gradient, factors, rule_gradient, rule_loss, lower_bound, sample)
            if isinstance(record.outcome, Tensor):
                guard.keep_buffers_if(record.outcome != int(Outcome.non_finite))
                self._drop_offer()
            elif record.outcome == Outcome.non_finite:
                guard.undo()
            else:
                self._drop_offer()
        if evaluated is not None:
            self.sample = Sample(evaluated, guard.entry, record.step_size)
        elif self.sample is not None:
            self.sample = self.sample._replace(step_size=record.step_size)
        self._conclude(record, state)
        return loss


def _given(
    owner: str, closure: Any, loss: Any, grads: list[Tensor | None]
) -> tuple[Tensor | float, list[Tensor | None]]:
    """Return the loss and gradients that the user computed."""
    if closure is not None:
        raise ClosureError(f"{owner}.step(closure=..., loss=...): give one of the two")
    if all(g is None for g in grads):
        raise ClosureError(f"{owner}.step(loss=...): .grad of all parameters is None; call loss.backward() before")
    try:
        return value_of(loss), grads
    except ClosureError:
        raise ClosureError(f"{owner}.step(loss={loss!r}): loss must be one real number") from None


def _move_by_tensor(
    params: Sequence[Tensor], directions: Sequence[Tensor], step: Tensor, factors: Sequence[float]
) -> None:
    """Move by a step that is still on the device; where it is 0, a direction that is not finite moves nothing."""
    for p, d, w in zip(params, directions, factors, strict=True):
        length = (step * w).to(device=p.device, dtype=p.dtype)
        p.sub_(torch.where(length > 0, d * length, torch.zeros_like(d)))


class SPSMax(PolyakOptimizer):
    """SPS_max: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr}, eq. (5).

    Args:
        params: Parameters or groups.
        lr: gamma_b > 0, the bound. Left out, it is found: at the first step, the longest one that does not raise the
            sample's loss; under "inverse_sqrt" estimated anew at each step after that
            (`adaptive_bilevel.policies.distance`).
        c: c > 0; 1 in the experiments, 1/2 in the theorems.
        lower_bound: l, any lower bound of the loss, e.g. 0 for cross-entropy; None: to be given at each step.
        decay: Schedule of the bound, "constant", "inverse_sqrt", "inverse" or a callable k -> factor.
        floor: No step is shorter (unless the bound is), eqs. (9) and (10).
        floor_decay: Schedule of the floor.
        direction: "sgd", or "adam" (slope in Adam's metric).
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SPSMax([x], lr=1.0)
    >>> float(optimizer.step(lambda: 0.5 * (x**2).sum()))
    6.5
    >>> optimizer.param_groups[0]["step_size"]
    0.5
    """

    _rule = policies.SPSMax

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "constant",
        floor: float = 0.0,
        floor_decay: Decay = "constant",
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        super().__init__(params, lr, options_of(locals()))


class SPSB(PolyakOptimizer):
    """SPSB: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr decay(k)}, eq. (7).

    Options as in `SPSMax`; the bound decays as 1/sqrt(k+1) ("inverse" for strongly convex problems).
    """

    _rule = policies.SPSB

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "inverse_sqrt",
        floor: float = 0.0,
        floor_decay: Decay = "constant",
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        super().__init__(params, lr, options_of(locals()))


class DecSPS(PolyakOptimizer):
    """DecSPS: step_k = (1/c_k) min{(f_i - lower_bound) / ||grad f_i||^2, c_{k-1} step_{k-1}}, eq. (6).

    c_k = c sqrt(k+1), so the step never grows.

    Args:
        params: Parameters or groups.
        lr: gamma_b,0 > 0, the first bound. Left out, it is found at the first step.
        c: c > 0.
        lower_bound: l, any lower bound of the loss; None: to be given at each step.
        direction: "sgd" or "adam".
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).
    """

    _rule = policies.DecSPS

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        super().__init__(params, lr, options_of(locals()))

    def _rule_state(self) -> Any:
        # c_{k-1} step_{k-1} bounds the next step, so it follows lr: a scheduler scales it.
        state, reference = super()._rule_state(), self._saved("lr", 0.0)
        return state._replace(product=state.product * (self._reference_lr() / reference)) if reference else state

    def _save_rule_state(self, state: Any, **more: Any) -> None:
        super()._save_rule_state(state, lr=self._reference_lr(), **more)
