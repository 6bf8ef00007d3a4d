"""The conduct that all optimizers of this package share: evaluation, starting points, records, warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError, warn
from ..evaluation.counts import Evaluations
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner
from ..policies import Outcome, Record, State, validation
from ..policies.scalars import Scalar
from .direction import Descent, adam, metric, sgd
from .groups import PolicyOptimizer

__all__ = ["AdaptiveOptimizer", "Sample"]

_WARNED = {
    Outcome.search_failed: "Parameters are as before. Often the gradient is not that of the loss which the closure "
    "returns, or the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give lower_bound= a number that the loss never falls below.",
    Outcome.no_descent: "The direction does not descend on the searched function; see optimizer.record.",
}


class Sample(NamedTuple):
    """The last sample that an optimizer stepped on, to be evaluated again by the level above.

    Attributes:
        closure: The closure.
        random: Random state before it was evaluated.
        step_size: The step that was taken on it.
    """

    closure: Closure
    random: RandomState
    step_size: float


class AdaptiveOptimizer(PolicyOptimizer):
    """A policy as a `torch.optim.Optimizer`; the concrete rules derive from it.

    `param_groups[i]["lr"]` scales the bound (or first trial) of the rule, so schedulers act on it; left out, it is 1
    and `param_groups[i]["scale"]` holds the bound (or first trial) that the rule found. Groups with different lr share
    one step: group i moves by step * lr_i / lr_0. All other options are the same for all groups.

    Attributes:
        record: The last step's `Record`; None before.
        evaluations: Every oracle call so far.
        sample: The last sample stepped on; None before.
    """

    mixes_momentum: ClassVar[bool] = False
    """Whether the step's momentum is not the direction's affair, see `adaptive_bilevel.bilevel.momentum`."""
    takes_offers: ClassVar[bool] = True
    """Whether the next step decides between two starting points, see `offer`."""

    def _prepare(self) -> None:
        super()._prepare()
        self._warned: dict[int, int] = {}
        self._skips: Scalar = 0
        self._looks = 0
        self._offered = False
        self.record: Record | None = None
        self.evaluations = Evaluations.single()
        self.sample: Sample | None = None

    def _restored(self) -> None:
        self._offered = any("offered" in self.state.get(p, {}) for p in self._parameters())

    def _sample_bound(self, lower_bound: Scalar | None) -> Scalar | None:
        """Return a lower bound that was given to a step, or raise."""
        if lower_bound is None:
            return None
        if not isinstance(lower_bound, Tensor):
            validation.finite(f"{type(self).__name__}.step", "lower_bound", lower_bound, optional=True)
        return validation.plain(lower_bound)

    def _descent(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Descent:
        direction = self.conduct.direction
        if callable(direction):
            made: Descent = direction(params, grads, self.state)
            return made
        if direction == "sgd":
            return sgd()
        group = self.param_groups[0]  # read at each step: schedulers that cycle momentum write to it
        if self.mixes_momentum:
            return metric(params, grads, self.state, group["betas"][1], group["eps"])
        return adam(params, grads, self.state, group["betas"], group["eps"])

    # ------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, guard: Guard, closure: Closure, params: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Return loss and gradients on the sample; first decide whether to go back to the point before a prediction.

        The prediction has to be worth more than a step of the usual length from there, of which there will be some
        anyway: what a loop of steps finds by itself it finds without the errors of the prediction.
        """
        stay = self._take_offer(params)
        if stay is None:
            return self._gradient(guard, closure, params)
        guard.copy()
        here = guard.value(closure)
        self.evaluations.upper.values += 1
        torch._foreach_copy_(params, stay)
        loss, grads = self._gradient(guard, closure, params, guard.entry, moved=True)
        here, there = on_host(here, loss)
        preferred = there <= here or here != here
        if there == there and not preferred:
            guard.mark()
            preferred = self._after_another_step(guard, closure, params, grads) <= here
            guard.recall()
            torch._foreach_copy_(params, stay)
        if preferred:
            guard.rebase()
            return loss, grads
        guard.put_back()
        return self._gradient(guard, closure, params, guard.entry)

    def _after_another_step(
        self, guard: Guard, closure: Closure, params: list[Tensor], grads: Sequence[Tensor | None]
    ) -> float:
        """Return the loss after a step from here that is as long as the last one was."""
        active, gradient, factors = self._with_gradient(params, grads)
        descent = self._descent(active, gradient)
        stepped = descent.precondition(gradient) if descent.step is None else descent.step
        length = next((float(g["step_size"]) for g in self.param_groups if float(g["lr"]) != 0.0), 0.0)
        descent.move(active, stepped, length, factors)
        self.evaluations.upper.values += 1
        return float(on_host(guard.value(closure, guard.entry))[0])

    def _gradient(
        self,
        guard: Guard,
        closure: Closure,
        params: list[Tensor],
        random: RandomState | None = None,
        *,
        moved: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return loss and gradients here; `moved`: the parameters are not where the step found them."""
        self.evaluations.upper.gradients += 1
        return guard.gradient(closure, params, random)

    def offer(self, points: Sequence[Tensor]) -> None:
        """Offer another starting point for the next step, copies of all parameters in order.

        The level above has moved the parameters to a prediction, and calls this with the point before. The next
        `step(closure)` goes back there unless the prediction has the smaller loss on the step's own sample, also after
        a step from there that is as long as the last one was. Parameters that somebody has changed in the meantime (a
        cold start) void the offer.
        """
        params = self._parameters()
        for p, point in zip(params, points, strict=True):
            self.state[p] = {**self.state[p], "offered": point}
        self._save_rule_state(self._rule_state(), offered_at=self._fingerprint(params))
        self._offered = True

    def _fingerprint(self, params: Sequence[Tensor]) -> float:
        """Return ||params||^2: it tells whether somebody moved them, in whichever way (versions do not count .data)."""
        return float(inner([p.detach() for p in params], [p.detach() for p in params]))

    def _take_offer(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        if not self._offered:
            return None
        if self._saved("offered_at", math.nan) != self._fingerprint(params):
            self._drop_offer()
            return None
        saved = [self.state.get(p, {}) for p in params]
        return [s["offered"] if "offered" in s else p.detach().clone() for p, s in zip(params, saved, strict=True)]

    def _drop_offer(self) -> None:
        if not self._offered:
            return
        for p in self._parameters():
            if "offered" in self.state.get(p, {}):
                self.state[p] = {k: v for k, v in self.state[p].items() if k != "offered"}
        keys: dict[Any, Any] = self.state
        keys["policy"] = {k: v for k, v in self._rule_saved.items() if k != "offered_at"}
        self._offered = False

    # ------------------------------------------------------------------------------------------ conclusion

    def _bound(self) -> tuple[float | None, float]:
        """Return bound and scale of a step's `Context`: lr is one of them, None and 1 the other."""
        lr = self._reference_lr()
        return (None, lr) if self.param_groups[0]["automatic"] else (lr, 1.0)

    def _conclude(self, record: Record, state: State) -> None:
        """Keep the record, tell what should be told, and count what may not go on."""
        self.record = record
        on_device = isinstance(record.step_size, Tensor)
        scale = state.found if self.param_groups[0]["automatic"] else 1.0
        for group, factor in zip(self.param_groups, self._factors(), strict=True):
            if on_device:
                moved = record.step_size > 0
                group["scale"] = torch.where(moved, scale, group["scale"])
                group["step_size"] = torch.where(moved, record.step_size * factor, group["step_size"])
            elif record.step_size > 0.0:
                group["scale"] = scale
                group["step_size"] = record.step_size * factor
        if on_device:
            # Looked at rarely, since looking waits for the device.
            self._skips = torch.where(record.outcome == int(Outcome.non_finite), self._skips + 1, 0)
            self._looks += 1
            if self._looks % self.conduct.max_skips == 0:
                self._refuse_skips(int(self._skips))
            return
        outcome = record.outcome
        self._skips = self._skips + 1 if outcome == Outcome.non_finite else 0
        if outcome in _WARNED:
            self._warn(outcome, f"{Outcome(outcome).sentence}. {_WARNED[outcome]}")
        self._refuse_skips(self._skips)

    def _refuse_skips(self, skips: int) -> None:
        if skips >= self.conduct.max_skips:
            raise NonFiniteError(
                f"{type(self).__name__}: {skips} steps in a row met a loss or gradient that is not finite; nothing "
                f"has moved since. Look at the data and the loss, or raise max_skips={self.conduct.max_skips}"
            )

    def _warn(self, key: int, message: str) -> None:
        """Warn at the 1st, 10th, 100th, ... time."""
        times = self._warned[key] = self._warned.get(key, 0) + 1
        if times in (1, 10, 100, 1000) or times % 10000 == 0:
            warn(f"{type(self).__name__} (time {times}): {message}")

    def __repr__(self) -> str:
        """Return the options and the last step."""
        options = {"lr": self.param_groups[0]["lr"], **self._options()}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        last = "" if self.record is None else f"; {self.record.describe()}"
        return f"{type(self).__name__}({listed}{last})"
