"""BiSPS: Polyak steps at the upper level of a bilevel problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import ClosureError, LowerLevelError
from ..evaluation.closures import require_closure, value_of
from ..evaluation.guard import Closure, Guard
from ..evaluation.means import averaged
from ..optim.direction import Direction
from ..optim.options import Conduct
from ..optim.polyak_step import PolyakOptimizer
from ..policies import Outcome, validation
from ..policies.schedule import Decay
from .functional import UpperLoss
from .lower import LowerLevel
from .source import DirectLoss, Source
from .upper import UpperOptimizer

__all__ = ["BiSPS", "UpperPolyak"]


@dataclass(frozen=True, kw_only=True)
class _Floor:
    """The floor: lr_min is alpha_l,0."""

    lr_min: float

    def __post_init__(self) -> None:
        validation.non_negative("BiSPS", "lr_min", self.lr_min)
        validation.make_plain(self)


class UpperPolyak(UpperOptimizer, PolyakOptimizer):
    """The step of `BiSPS`. Abstract: `BiSPS`, and a host's optimizers derive from it."""

    _absent = (*PolyakOptimizer._absent, "floor", "floor_decay")
    floor: _Floor

    def bind(self, lower: Any) -> None:
        """Set the lower level, whose Polyak rules count the iterations of this one from now on."""
        super().bind(lower)
        for optimizer in self._clocked():
            optimizer.set_clock(max(optimizer.clock, 0))

    def _clocked(self) -> list[PolyakOptimizer]:
        optimizers = self.lower.optimizers if isinstance(self.lower, LowerLevel) else []
        return [o for o in optimizers if isinstance(o, PolyakOptimizer)]

    def _make_policy(self, rule: policies.Envelope) -> policies.Envelope:
        return dataclasses.replace(rule, floor=self.floor.lr_min, floor_decay=rule.decay)

    def step(  # type: ignore[override]
        self,
        upper_closure: UpperLoss | None = None,
        lower_closure: Any = None,
        *,
        closure: UpperLoss | None = None,
        loss: Tensor | float | None = None,
        lower_bound: float | None = None,
        lower: Any = None,
        hypergradient: Any = None,
    ) -> Tensor | float:
        """Take one upper step along the hypergradient, and return the upper loss before it.

        Args:
            upper_closure: Returns the upper loss f(x, y) on the sample of the hypergradient; evaluated once, without
                gradients.
            lower_closure: Returns the lower loss, for the first step where lr was left out (its gradients are evaluated
                three times, or more). Left out: the last closure that the lower optimizer stepped on. Later steps do
                not use it: the rule needs no response.
            closure: Another name of `upper_closure`, that of torch's optimizers.
            loss: In the place of a closure: that loss.
            lower_bound: Overrides the option for this sample.
            lower: As in `BiSLS`: (tensors, loss) of functional code.
            hypergradient: As in `BiSLS`: tensors, or an estimator for this step.

        Raises:
            HypergradientError: No upper parameter has a .grad, or the hypergradient does not fit.
            ClosureError: Neither closure nor loss.
            NonFiniteError: max_skips steps in a row were not finite.
        """
        upper_closure = self._one_closure(upper_closure, closure)
        if loss is None and self._is_prepared_only(upper_closure):
            return 0.0
        if upper_closure is None and loss is None and self.host is not None:
            taken: Tensor | float = self.host.step(self)
            return taken
        given: dict[str, Any] = {"lower": lower, "hypergradient": hypergradient, "lower_bound": lower_bound}
        return self.advance(upper_closure, lower_closure, loss=loss, **given)

    def _lower_change(self, guard: Guard, closures: Any, lower: list[Tensor]) -> Callable[[], float] | None:
        """Return what gives |grad_y g(x', y) - grad_y g(x, y)| at the present x'; None where g is not known."""
        try:
            problems = self.lower.problems(closures, guard)
        except LowerLevelError:
            return None

        def gradients() -> list[Tensor]:
            self.evaluations.lower.gradients += 1
            each = [guard.gradient(p.closure, lower, p.random)[1] for p in problems]
            return [g.clone() for found in each for g in found if g is not None]

        guard.mark()
        before = gradients()

        def change() -> float:
            moved = torch._foreach_sub(gradients(), before)
            return math.sqrt(sum(float((d**2).sum()) for d in moved))

        return change

    def _advance(
        self,
        upper_closure: Closure | None,
        lower_closure: Any,
        hypergradient: list[Tensor | None] | None,
        *,
        loss: Tensor | float | None = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        params, lower_bound = self._parameters(), self._sample_bound(lower_bound)
        lower = self.lower.tensors()
        with Guard([*params, *lower], self._workspace) as guard:
            objective = upper_closure if loss is not None else require_closure("BiSPS", upper_closure)
            grads = averaged(self._begin(guard, objective, params, hypergradient), params)
            known = objective.evaluated(params) if isinstance(objective, DirectLoss) else None
            if objective is None or loss is not None:
                value = _given(objective, loss)
            elif known is not None:
                value = known.loss
            else:
                value = guard.value(objective)
                self.evaluations.upper.values += 1
            gradient = self._with_gradient(params, grads)
            change = self._lower_change(guard, lower_closure, lower) if lower and self._seeks_bound() else None
            response, h = None if change is None else (guard, change), gradient.values
            record, state = self._polyak_step(gradient, h, h, value, lower_bound, response=response)
            if not isinstance(record.outcome, Tensor) and record.outcome == Outcome.non_finite:
                guard.undo()
        if isinstance(record.outcome, Tensor) or record.moved:
            for optimizer in self._clocked():
                optimizer.set_clock(optimizer.clock + 1)
        self._conclude(record, state, value)
        return value


@final
class BiSPS(UpperPolyak):
    """BiSPS: alpha_k = min{max{alpha_l,k, (f - lower_bound) / (c ||h||^2)}, alpha_b,k}, x <- x - alpha_k h, eq. (12).

    `.grad` of the upper parameters holds the hypergradient h when `step` is called.

    Args:
        params: Upper parameters or groups.
        lr: alpha_b,0 > 0, the bound. Left out, it is found: at the first step it is Polyak's, or so much shorter that
            the lower gradient, which changes with x, changes by at most 4 times what it does at half of the step (a
            parameter that is a logarithm is not thrown far off); under "inverse_sqrt" it is estimated anew at each
            step after that (`adaptive_bilevel.policies.distance`).
        lr_min: alpha_l,0 >= 0, the floor; it decays like the bound.
        hypergradient: As in `BiSLS`.
        lower: The lower optimizer, or a list; if it is a Polyak rule of this package, its bound beta_b,k decays with
            the upper iterations and is constant within one.
        c: c > 0.
        lower_bound: A lower bound of f over both variables, e.g. 0. (A bound for the present y makes every step 0.)
            None: to be given at each step, and lr here; for losses without a bound, use `BiSLS`.
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
        hypergradient: Source = None,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "inverse_sqrt",
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        floor = _Floor(lr_min=lr_min)
        rule = policies.Envelope(c=c, lower_bound=lower_bound, decay=decay)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct, floor=floor)
        self.hypergradient = hypergradient
        self.bind(lower)


def _given(closure: Closure | None, loss: Tensor | float | None) -> Tensor | float:
    """Return the loss that the user computed."""
    if closure is not None:
        raise ClosureError("BiSPS.step(closure=..., loss=...): give one of the two")
    try:
        return value_of(loss)
    except ClosureError:
        raise ClosureError(f"BiSPS.step(loss={loss!r}): loss must be one real number") from None
