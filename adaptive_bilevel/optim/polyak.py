"""The step that the Polyak rules share as optimizers: no trial, and on an accelerator no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ClosureError, OptionError
from ..evaluation.closures import require_closure, value_of
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.reductions import agree, on_host, on_host_with_inner
from ..evaluation.tensors import gradients_of, slope_of, tainted
from ..evaluation.vectors import on_cpu
from ..policies import Context, Outcome, Record, State, Trial
from ..policies.scalars import Scalar
from .base import AdaptiveOptimizer, Sample
from .direction import Descent

__all__ = ["PolyakOptimizer"]


class PolyakOptimizer(AdaptiveOptimizer):
    """A Polyak rule as an optimizer; the concrete ones are in `adaptive_bilevel.optim.sps`."""

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
    ) -> tuple[Record, State]:
        """Take the step and return its record and the rule's state after it; a first bound is tried on the sample."""
        if lower_bound is None and self.rule.lower_bound is None:
            raise OptionError(
                f"{type(self).__name__}(lower_bound=None): the rule needs a lower bound of the loss; give one to the "
                "optimizer or to step(lower_bound=...), or use SLS for losses that are unbounded below"
            )
        descent = self._descent(active, gradient)
        value: Scalar
        slope: Scalar
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
        bound, scale = self._bound()
        context = Context(value, slope, trial, lower_bound, None, bound, scale)
        record, state = self.policy.propose(state, context)
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
    owner: str, closure: Closure | None, loss: Tensor | float, grads: list[Tensor | None]
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
