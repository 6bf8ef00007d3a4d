"""SLS and SLSB as optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..evaluation.attempts import Attempts
from ..evaluation.closures import require_closure
from ..evaluation.guard import Closure, Guard
from ..evaluation.objective import Objective, Replay
from ..evaluation.reductions import on_host_with_inner
from ..evaluation.tensors import gradients_of, tainted
from ..policies import Context, Outcome, Record, validation
from ..policies.margin import shortened
from ..policies.scalars import resolution
from ..policies.schedule import Decay
from .averaged import AveragedSearch
from .direction import Descent, Direction, Gradient
from .options import Conduct
from .projection import Section
from .search_path import SearchPath, scaled
from .slope_rounding import most_ratio

__all__ = ["SLS", "SLSB", "LineSearch"]


class LineSearch(AveragedSearch):
    """The ``step`` of all line searches. Abstract base class of `SLS`, `SLSB` and the optimizers of hosts."""

    def _check_lr(self, lr: float | None) -> None:
        super()._check_lr(lr)
        validation.finite(type(self).__name__, "lr", lr, optional=True)

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, step_closure: Closure | None = None, lower_bound: float | None = None
    ) -> Tensor:
        """Search a step on the closure's sample, take it, and return the loss before the step.

        Args:
            closure: Returns the loss of one sample. It is evaluated once with gradients, and once for each trial.
            step_closure: A second sample. The step is searched on the loss and gradient of this closure, and taken
                along the gradient of `closure`.
            lower_bound: Overrides the option `lower_bound` for this sample.

        Raises:
            ClosureError: There is no closure, or it does not return a scalar that requires a gradient.
            TensorError: A gradient is sparse.
            NonFiniteError: The loss or a gradient was not finite in max_skips steps in a row.
        """
        if self._is_prepared_only(closure):
            return torch.zeros(())
        if closure is None and self.host is not None:
            loss: Tensor = self.host.step(self)
            return loss
        return self.advance(closure, step_closure=step_closure, lower_bound=lower_bound)

    def advance(
        self, closure: Closure | None, *, step_closure: Closure | None = None, lower_bound: float | None = None
    ) -> Tensor:
        """Do what `step` does, without torch's hooks. For hosts whose own step has hooks."""
        owner = type(self).__name__
        closure = require_closure(owner, closure)
        lower_bound = self._sample_bound(lower_bound)
        params = self._parameters()
        with torch.no_grad(), Guard(params, self._workspace) as guard:
            loss, grads, own, _ = self._evaluate(guard, closure, params)
            gradient = self._with_gradient(params, grads)
            searched, random, searched_loss = closure, guard.entry, loss
            searched_gradient = gradient.values if own is None else gradients_of(gradient.tensors, params, own)
            if step_closure is not None:
                searched, random = require_closure(owner, step_closure), guard.random_state()
                searched_loss, searched_grads = guard.gradient(searched, params)
                self._own_counts.gradients += 1
                searched_gradient = gradients_of(gradient.tensors, params, searched_grads)
                searched_loss = tainted(searched_loss, loss, gradient.values)
            guard.mark()
            proposed = self._propose(gradient)
            descent = proposed.descent
            if step_closure is None:
                directions = self._measured_along(gradient, descent, closure, loss)
            else:
                directions = descent.precondition(searched_gradient)
            value, slope = on_host_with_inner(searched_loss, searched_gradient, directions, gradient.factors)

            away, attempts, moved_back = False, Attempts(), False

            def trial(step: float) -> float:
                nonlocal away
                if away:
                    guard.put_back()
                away = True
                descent.move(gradient.tensors, directions, step, gradient.factors)
                self._own_counts.values += 1
                return float(attempts.value(lambda: guard.value(searched, random)))

            bound, scale = self._bound()
            if bound == 0.0 or scale == 0.0:
                record, state = Record(0.0, 0.0, 0.0, Outcome.at_bound, slope=slope), self._rule_state()
            else:
                guard.copy()
                rounding = resolution(searched_loss)
                before = self._reached()
                trials = self._closure_checks.watch(trial, value, slope, rounding, gradient.tensors, directions)
                most = most_ratio(value, slope, gradient.tensors, directions, gradient.factors)
                sample = Context(
                    value, slope, trials, lower_bound, None, bound, scale, rounding=rounding, most_ratio=most
                )
                record, state = self.policy.propose(before, sample)
                attempts.conclude(record.moved)
                record, state = trials.conclude(record, state, before, lambda: trial(0.0))
                moved_back = trials.looked
            if not record.moved:
                guard.put_back()
                self._stay(params)
                if record.outcome == Outcome.non_finite:
                    guard.undo()
                elif record.outcome == Outcome.no_descent:
                    self._commit_direction(gradient, proposed)  # its memory has to turn, or nothing ever moves again
            else:
                found, record = record, self._scheduled(record)
                state = shortened(state, record.step_size / found.step_size)
                there = record.trials > 0 and not moved_back and record is found
                if not there or descent.step is not None or step_closure is not None:
                    guard.put_back()
                    stepped = directions if step_closure is None else gradient.values
                    stepped = stepped if descent.step is None else descent.step
                    descent.move(gradient.tensors, stepped, record.step_size, gradient.factors)
                    state = self._look(state, lambda: guard.value(searched, random))
                self._settle(params, guard.copy(), state)
                self._commit_direction(gradient, proposed)
                self._save_rule_state(state)
        self.sample = Replay(searched, random, record.step_size)
        self._conclude(record, state, loss)
        return loss

    def _measured_along(self, gradient: Gradient, descent: Descent, closure: Closure, loss: Tensor) -> list[Tensor]:
        """Return the direction to the point that a host's projection leaves of the longest step.

        Sufficient decrease along -g cannot be had where the projection takes a part of g away.
        """
        directions = descent.precondition(gradient.values)
        if not isinstance(closure, Objective) or closure.project is None:
            return directions
        path = SearchPath(gradient, scaled(directions, gradient.factors), descent)
        bound, scale = self._bound()
        policy: Any = self.policy
        value = float(loss)
        longest = policy.first_trial(
            self._rule_state(),
            loss=value,
            slope=path.promised,
            bound=bound,
            scale=scale,
            most_ratio=most_ratio(value, path.promised, gradient.tensors, path.along),
        )
        if not (math.isfinite(longest) and longest > 0.0 and math.isfinite(path.promised)):
            return directions
        listed = self._parameters()
        section = Section.of(closure.project, listed, gradient.tensors, gradient.factors)
        along = path.within(listed, section, longest).along
        return [d if w in (0.0, 1.0) else d / w for d, w in zip(along, gradient.factors, strict=True)]


class SLS(LineSearch):
    """Stochastic line search: the largest tried step with sufficient decrease on the sample, eq. (8).

    The step is the first of start, start w, start w^2, ... with f_i(x - step d) <= f_i(x) - c step <grad f_i, d> +
    slack. `adaptive_bilevel.policies.SLS` has the rule.

    Args:
        params: Parameters or groups.
        lr: The first trial of the first search, > 0. If None, it is (f - lower_bound)/(c slope) at the first step: no
            longer step can pass. Later searches may grow beyond it, up to `max_step`.
        c: Armijo constant, in (0, 1).
        shrink: w, the factor from a rejected trial to the next one, in (0, 1).
        grow: eta >= 1, the factor of reset="grow".
        reset: How a search begins: "initial" (lr), "keep" (the last step) or "grow" (eta times the last step). These
            are options 1, 2 and 3 of Algorithm 3.
        slack: delta >= 0, the increase of the loss that a trial may have.
        lower_bound: A lower bound of the loss, or None if there is none.
        max_step: The largest trial, or None for no limit.
        max_trials: Number of trials after which a search fails. If None, it fails at 1e-12 of its first trial.
        direction: "sgd", "adam" (the search is along A^{-1} g, the step along A^{-1} m), or a `Direction`.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SLS([x])
    >>> for _ in range(60):
    ...     loss = optimizer.step(lambda: (x**2 * torch.tensor([1.0, 10.0])).sum())
    >>> bool(loss < 1e-6)
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 0.1,
        shrink: float = 0.5,
        grow: float = 1.2,
        reset: str = "grow",
        slack: float = 0.0,
        lower_bound: float | None = 0.0,
        max_step: float | None = None,
        max_trials: int | None = None,
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.SLS(
            c=c,
            shrink=shrink,
            grow=grow,
            reset=reset,
            slack=slack,
            lower_bound=lower_bound,
            max_step=max_step,
            max_trials=max_trials,
        )
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)


class SLSB(LineSearch):
    """Stochastic line search under a decaying bound: step_k <= lr decay(k), eq. (8) with gamma_b,k.

    Args:
        params: Parameters or groups.
        lr: gamma_b,0 > 0, the bound. If None, it is estimated at the first step, from the longest step that does not
            raise the sample's loss. With decay="inverse_sqrt", it is estimated again at each later step
            (`adaptive_bilevel.policies.distance`).
        decay: Schedule of the bound: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        c: As in `SLS`.
        shrink: As in `SLS`.
        grow: As in `SLS`.
        reset: As in `SLS`; "initial" begins at the bound.
        slack: As in `SLS`.
        lower_bound: As in `SLS`.
        max_trials: As in `SLS`.
        direction: As in `SLS`.
        betas: As in `SLS`.
        eps: As in `SLS`.
        max_skips: As in `SLS`.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SLSB([x])
    >>> for _ in range(60):
    ...     loss = optimizer.step(lambda: (x**2 * torch.tensor([1.0, 10.0])).sum())
    >>> bool(loss < 1e-6)
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        decay: Decay = "inverse_sqrt",
        c: float = 0.1,
        shrink: float = 0.5,
        grow: float = 1.2,
        reset: str = "grow",
        slack: float = 0.0,
        lower_bound: float | None = 0.0,
        max_trials: int | None = None,
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.SLSB(
            decay=decay,
            c=c,
            shrink=shrink,
            grow=grow,
            reset=reset,
            slack=slack,
            lower_bound=lower_bound,
            max_trials=max_trials,
        )
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)
