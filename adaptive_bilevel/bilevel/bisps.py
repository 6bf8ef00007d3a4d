"""BiSPS: Polyak steps at the upper level of a bilevel problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import ClosureError, LowerLevelError
from ..evaluation import foreach
from ..evaluation.closures import require_closure, value_of
from ..evaluation.guard import Closure, Guard
from ..evaluation.means import averaged
from ..evaluation.vectors import dot
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
    """The step of `BiSPS`. Abstract base class of `BiSPS` and the optimizers of hosts."""

    _absent = (*PolyakOptimizer._absent, "floor", "floor_decay")
    floor: _Floor

    def bind(self, lower: Any) -> None:
        """Set the lower level. The clock of its Polyak rules is then the number of upper iterations."""
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
        """Take one upper step along the hypergradient, and return the upper loss before the step.

        Args:
            upper_closure: Returns the upper loss f(x, y) on the sample of the hypergradient. It is evaluated once,
                without gradients.
            lower_closure: Returns the lower loss. Only the first step uses it, if lr is None; it evaluates the gradient
                at least three times. By default, the last closure of the lower optimizer.
            closure: Another name of `upper_closure`, as in `torch.optim`.
            loss: The upper loss, in place of a closure.
            lower_bound: Overrides the option `lower_bound` for this sample.
            lower: As in `BiSLS`: (tensors, loss) of functional code.
            hypergradient: As in `BiSLS`: tensors, or an estimator for this step.

        Raises:
            HypergradientError: No upper parameter has a .grad, or the hypergradient does not fit.
            ClosureError: There is neither a closure nor a loss.
            NonFiniteError: The loss or a gradient was not finite in max_skips steps in a row.
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
            moved = foreach.sub(gradients(), before)
            return math.sqrt(dot(moved, moved))

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

    ``.grad`` of the upper parameters holds the hypergradient h when ``step`` is called.

    Args:
        params: Upper parameters or groups.
        lr: alpha_b,0 > 0, the bound. If None, it is estimated. At the first step, it is Polyak's step, shortened until
            the change of the lower gradient is at most 4 times that at half of the step; this keeps logarithms in
            range. With decay="inverse_sqrt", it is estimated again at each later step
            (`adaptive_bilevel.policies.distance`).
        lr_min: alpha_l,0 >= 0, the floor. It decays as the bound does.
        hypergradient: As in `BiSLS`.
        lower: The lower optimizer, or a list. If it is a Polyak rule of this package, its bound beta_b,k decays with
            the upper iterations, and is constant within one.
        c: c > 0.
        lower_bound: A lower bound of f over both variables, for example 0. The minimum over x at the present y is not
            one: every step would be 0. If None, give it to each ``step``, and lr here. For losses without a lower
            bound, use `BiSLS`.
        decay: Schedule of bound and floor: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        direction: "sgd", "adam", or a `Direction`.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.
        TensorError: Upper and lower parameters share a tensor, or one is sparse or complex.

    >>> import torch
    >>> from adaptive_bilevel import SLS
    >>> from adaptive_bilevel.hypergradient import assign, implicit
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    >>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
    >>> g = lambda: ((y - x / 2) ** 2).sum()
    >>> inner = SLS([y])
    >>> outer = BiSPS([x], lower=inner)
    >>> for _ in range(50):
    ...     for _ in range(5):
    ...         _ = inner.step(g)
    ...     assign([x], implicit(f, g, [x], [y]))
    ...     _ = outer.step(f)
    >>> bool(abs(x - 10 / 7) < 0.1)
    True
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
