"""SPS_max, DecSPS and SPSB as optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import ClosureError
from ..evaluation.closures import require_closure, value_of
from ..evaluation.guard import Closure, Guard
from ..evaluation.objective import Replay
from ..evaluation.tensors import gradients_of, tainted
from ..policies import Outcome
from ..policies.scalars import Scalar
from ..policies.schedule import Decay
from .base import AdaptiveOptimizer
from .direction import Direction
from .options import Conduct
from .polyak_step import PolyakOptimizer

__all__ = ["SPSB", "DecSPS", "DecreasingPolyak", "Polyak", "SPSMax"]


class Polyak(PolyakOptimizer):
    """The ``step`` of all Polyak rules. Abstract base class of the rules and of the optimizers of hosts."""

    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss: Tensor | float | None = None,
        step_closure: Closure | None = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Take one step and return the loss before the step.

        Args:
            closure: Returns the loss of one sample. It is evaluated once, with gradients. If lr is None, the first step
                also searches its bound; each trial is one more evaluation, without gradients.
            loss: The loss whose gradient is already in ``.grad``, in place of a closure.
            step_closure: A second sample. The loss and gradient of this closure give the step size; the gradient of
                `closure` gives the direction.
            lower_bound: Overrides the option `lower_bound` for this sample.

        Raises:
            ClosureError: There is neither a closure nor a loss, or the closure does not return a scalar that requires a
                gradient.
            TensorError: A gradient is sparse.
            NonFiniteError: The loss or a gradient was not finite in max_skips steps in a row.
        """
        if loss is None and self._is_prepared_only(closure):
            return 0.0
        if closure is None and loss is None and self.host is not None:
            taken: Tensor | float = self.host.step(self)
            return taken
        return self.advance(closure, loss=loss, step_closure=step_closure, lower_bound=lower_bound)

    def advance(
        self,
        closure: Closure | None = None,
        *,
        loss: Tensor | float | None = None,
        step_closure: Closure | None = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Do what `step` does, without torch's hooks. For hosts whose own step has hooks."""
        owner = type(self).__name__
        lower_bound = self._sample_bound(lower_bound)
        params = self._parameters()
        with torch.no_grad(), Guard(params, self._workspace) as guard:
            grads: list[Tensor | None]
            evaluated, sample, own = None, None, None
            if loss is None:
                evaluated = require_closure(owner, closure)
                loss, grads, own, _ = self._evaluate(guard, evaluated, params)
                sample = guard, evaluated, guard.entry
            else:
                loss, grads = _given(owner, closure, loss, [p.grad for p in params])
            gradient = self._with_gradient(params, grads)
            rule_loss, rule_gradient, along = loss, gradient.values, gradient.values
            if own is not None:
                rule_gradient = gradients_of(gradient.tensors, params, own)
            if step_closure is not None:
                sample = guard, require_closure(owner, step_closure), guard.random_state()
                rule_loss, rule_grads = guard.gradient(step_closure, params)
                self._own_counts.gradients += 1
                rule_gradient = along = gradients_of(gradient.tensors, params, rule_grads)
                rule_loss = tainted(rule_loss, loss, gradient.values)
            record, state = self._polyak_step(gradient, rule_gradient, along, rule_loss, lower_bound, sample)
            if isinstance(record.outcome, Tensor):
                guard.keep_buffers_if(record.outcome != int(Outcome.non_finite))
            elif record.outcome == Outcome.non_finite:
                guard.undo()
        if evaluated is not None:
            self.sample = Replay(evaluated, guard.entry, record.step_size)
        elif self.sample is not None:
            self.sample = self.sample._replace(step_size=record.step_size)
        self._conclude(record, state, loss)
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


class SPSMax(Polyak):
    """SPS_max: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr}, eq. (5).

    Args:
        params: Parameters or groups.
        lr: gamma_b > 0, the bound. If None, it is estimated: at the first step, it is the longest step that does not
            raise the sample's loss. With decay="inverse_sqrt", it is estimated again at each later step
            (`adaptive_bilevel.policies.distance`).
        c: c > 0; 1 in the paper's experiments, 1/2 in its theorems.
        lower_bound: l, a lower bound of the loss, for example 0 for cross-entropy. If None, give it to each ``step``.
        decay: Schedule of the bound: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        floor: The smallest step, as far as the bound allows it, eqs. (9) and (10).
        floor_decay: Schedule of the floor.
        direction: "sgd", "adam" (the slope is then that of Adam's metric), or a `Direction`.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SPSMax([x], lr=1.0)
    >>> float(optimizer.step(lambda: 0.5 * (x**2).sum()))
    6.5
    >>> optimizer.param_groups[0]["step_size"]
    0.5
    """

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
        rule = policies.SPSMax(c=c, lower_bound=lower_bound, decay=decay, floor=floor, floor_decay=floor_decay)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)


class SPSB(Polyak):
    """SPSB: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr decay(k)}, eq. (7).

    The options are those of `SPSMax`. The bound decays as 1/sqrt(k+1) by default; decay="inverse" is for strongly
    convex problems.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SPSB([x], lr=1.0)
    >>> for _ in range(10):
    ...     loss = optimizer.step(lambda: 0.5 * (x**2).sum())
    >>> bool(loss < 1e-3)
    True
    """

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
        rule = policies.SPSB(c=c, lower_bound=lower_bound, decay=decay, floor=floor, floor_decay=floor_decay)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)


class DecreasingPolyak(Polyak):
    """The ``step`` of `DecSPS`, whose bound is the last step. Abstract base class."""

    _absent = (*AdaptiveOptimizer._absent, "decay")

    def _rule_state(self) -> Any:
        # c_{k-1} step_{k-1} bounds the next step, so it follows lr: a scheduler scales it.
        state, reference = super()._rule_state(), self._saved("lr", 0.0)
        return state._replace(product=state.product * (self._reference_lr() / reference)) if reference else state

    def _save_rule_state(self, state: Any, **more: Scalar) -> None:
        super()._save_rule_state(state, lr=self._reference_lr(), **more)


class DecSPS(DecreasingPolyak):
    """DecSPS: step_k = (1/c_k) min{(f_i - lower_bound) / ||grad f_i||^2, c_{k-1} step_{k-1}}, eq. (6).

    With c_k = c sqrt(k+1), the step never grows.

    Args:
        params: Parameters or groups.
        lr: gamma_b,0 > 0, the first bound. If None, it is estimated at the first step.
        c: c > 0.
        lower_bound: l, a lower bound of the loss. If None, give it to each ``step``.
        direction: "sgd", "adam", or a `Direction`.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = DecSPS([x], lr=1.0)
    >>> for _ in range(10):
    ...     loss = optimizer.step(lambda: 0.5 * (x**2).sum())
    >>> bool(loss < 0.5)
    True
    """

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
        rule = policies.DecSPS(c=c, lower_bound=lower_bound)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)
