"""The step that all Polyak rules share, at either level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation.attempts import Attempts
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.reductions import agree, on_host_with_inner
from ..evaluation.tensors import slope_of
from ..evaluation.vectors import on_cpu
from ..policies import Context, Outcome, Record, State, Trial
from ..policies.armijo import polyak_ratio
from ..policies.bounded import reach
from ..policies.scalars import Scalar
from .base import AdaptiveOptimizer
from .direction import Descent, Gradient
from .slope_rounding import most_ratio

__all__ = ["PolyakOptimizer"]


class PolyakOptimizer(AdaptiveOptimizer):
    """The step that the Polyak rules share: no trial, and on an accelerator no wait for the device."""

    steps_uncompiled: ClassVar[bool] = True

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
        gradient: Gradient,
        rule_gradient: Sequence[Tensor],
        along: Sequence[Tensor],
        loss: Tensor | float,
        lower_bound: float | None,
        sample: tuple[Guard, Closure, RandomState] | None = None,
        response: tuple[Guard, Callable[[], float]] | None = None,
    ) -> tuple[Record, State]:
        """Take the step and return its record and the rule's state after it; a first bound is tried on the sample.

        The slope is that of `rule_gradient` along `along`, in the direction's metric. Where the loss is not one of
        these parameters alone, a first bound is tried on a `response` instead: how much what answers has changed.
        """
        if lower_bound is None and self.rule.lower_bound is None:
            raise OptionError(
                f"{type(self).__name__}(lower_bound=None): the rule needs a lower bound of the loss; give one to the "
                "optimizer or to step(lower_bound=...), or use SLS for losses that are unbounded below"
            )
        proposed = self._propose(gradient)
        descent = proposed.descent
        value: Scalar
        slope: Scalar
        directions = descent.precondition(along)
        if self._on_host(gradient.tensors):
            value, slope = on_host_with_inner(loss, rule_gradient, directions, gradient.factors)
        else:
            value, slope = agree(loss, slope_of(rule_gradient, directions, gradient.factors))
        state, clock = self._rule_state(), self.clock
        if clock >= 0:
            state = state._replace(count=clock)
        trial, attempts = None, Attempts()
        if sample is not None and self._seeks_bound():
            trial = self._trial(*sample, gradient, directions, descent, attempts)
        bound, scale = self._bound()
        context = Context(value, slope, trial, lower_bound, None, bound, scale)
        if self._on_host(gradient.tensors):
            most = most_ratio(float(value), float(slope), gradient.tensors, directions, gradient.factors)
            context = context._replace(most_ratio=most)
        if response is not None and self._seeks_bound():
            guard, change = response
            guard.copy()

            def changed(step: float) -> float:
                descent.move(gradient.tensors, directions, step, gradient.factors)
                found = change()
                guard.put_back()
                return found

            low = self.rule.lower_bound if lower_bound is None else lower_bound
            longest = float(polyak_ratio(value, slope, low, 1.0, context.most_ratio))
            context = context._replace(cap=reach(changed, longest))
        record, state = self.policy.propose(state, context)
        attempts.conclude(trial is None or record.moved)
        stepped = gradient.values if descent.step is None else descent.step
        if isinstance(record.step_size, Tensor):
            _move_by_tensor(gradient.tensors, stepped, record.step_size, gradient.factors)
            self._save_rule_state(state, **({} if trial is None else {"tried": record.moved}))
            turned = record.outcome == int(Outcome.no_descent)
            self._commit_direction(gradient, proposed, (record.step_size > 0) | turned)
        elif record.moved:
            descent.move(gradient.tensors, stepped, record.step_size, gradient.factors)
            self._save_rule_state(state)
            self._commit_direction(gradient, proposed)
        elif record.outcome == Outcome.no_descent:
            self._commit_direction(gradient, proposed)  # its memory has to turn, or nothing ever moves again
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
        gradient: Gradient,
        directions: Sequence[Tensor],
        descent: Descent,
        attempts: Attempts,
    ) -> Trial:
        guard.mark()
        guard.copy()
        self._workspace.copies = []  # needed once only

        def trial(step: float) -> float:
            descent.move(gradient.tensors, directions, step, gradient.factors)
            self._own_counts.values += 1
            value = float(attempts.value(lambda: guard.value(closure, random)))
            guard.put_back()
            return value

        return trial


def _move_by_tensor(
    params: Sequence[Tensor], directions: Sequence[Tensor], step: Tensor, factors: Sequence[float]
) -> None:
    """Move by a step that is still on the device; where it is 0, a direction that is not finite moves nothing."""
    for p, d, w in zip(params, directions, factors, strict=True):
        length = (step * w).to(device=p.device, dtype=p.dtype)
        p.sub_(torch.where(length > 0, d * length, torch.zeros_like(d)))
