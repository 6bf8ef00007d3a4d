"""The optimizers of the core as Betty steps them: rebuilt from ``defaults``, and without a closure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adaptive_bilevel import optim as core
from adaptive_bilevel.errors import ClosureError, OptionError
from adaptive_bilevel.evaluation.guard import Closure, Guard, RandomState
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.direction import Descent
from adaptive_bilevel.optim.projection import Section
from adaptive_bilevel.optim.search_path import Move
from adaptive_bilevel.policies.search import Search

from .seat import Seat

__all__ = ["SLS", "SLSB", "SPSB", "DecSPS", "Hosted", "SPSMax"]


class Hosted(AdaptiveOptimizer):
    """A problem's optimizer: ``step()`` takes what Betty has just evaluated.

    Betty has put the gradient into .grad, so the loss is evaluated again for trials only, which apply the problem's
    param_callback.
    """

    _seat: Seat | None = None
    _hosted = False

    def __init__(self, params: ParamsT, lr: float | None = None, **options: Any) -> None:
        cast(Any, super()).__init__(params, lr, **options)
        if self._callables:
            name, value = next(iter(self._callables.items()))
            raise OptionError(
                f"{type(self).__name__}({name}={value!r}): Betty builds optimizers anew from plain values, where a "
                "function is lost; name a schedule, or give the problem a scheduler (LambdaLR scales lr)"
            )

    def _prepare(self) -> None:
        super()._prepare()
        self._seat = None  # a copy is nobody's optimizer yet

    def sit(self, seat: Seat) -> None:
        """Take the place that `bind` gives."""
        self._seat = seat

    @torch.no_grad()
    def step(self, closure: Closure | None = None, **given: Any) -> Any:
        """Take one step on what Betty has just evaluated, and return the loss before it.

        Args:
            closure: For a step of one's own (``custom_optimizer_step``): as the optimizer of the core takes it.
            given: Likewise.

        Raises:
            ClosureError: Betty stepped an optimizer that was not bound.
        """
        step = inspect.unwrap(cast(Any, super()).step.__func__)  # torch's hooks are around this one already
        if closure is not None or given:
            return step(self, closure, **given)
        if self._seat is None:
            raise ClosureError(
                f"{type(self).__name__}.step(): the optimizer is not bound to its problem. Add  bind(engine)  after "
                "engine = Engine(...)  (from adaptive_bilevel_betty import bind), or use AdaptiveEngine; after "
                "problem.set_optimizer(...) bind again"
            )
        self._hosted = True
        try:
            with self._seat.replay.untraced():
                loss = self._take(step, self._seat)
        finally:
            self._hosted = False
        record = self.record
        assert record is not None
        self._seat.replay.report({"step_size": record.step_size, "trials": record.trials, "outcome": record.outcome})
        return loss

    def _take(self, step: Any, seat: Seat) -> Any:
        def projected() -> Tensor:
            if torch.is_grad_enabled() or not seat.projects:
                return seat.replay.closure()
            with seat.projected():
                return seat.replay.closure()

        loss = step(self, projected)
        if self.sample is not None:
            self.sample = self.sample._replace(closure=seat.replay.closure)
        return loss

    def _gradient(
        self,
        guard: Guard,
        closure: Closure,
        params: list[Tensor],
        random: RandomState | None = None,
        *,
        moved: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return what Betty knows of the point that it evaluated; elsewhere, the same with its callbacks applied."""
        if not self._hosted:
            return super()._gradient(guard, closure, params, random, moved=moved)
        assert self._seat is not None
        if not moved:
            return self._seat.replay.loss, [None if p.grad is None else p.grad.detach() for p in params]
        loss, grads = super()._gradient(guard, closure, params, random, moved=True)
        return loss, self._seat.processed(params, grads)

    def offer(self, points: Sequence[Tensor]) -> None:
        """Offer another starting point; with several upper problems, the one before the first of their predictions.

        Neither the prediction, where the parameters are, nor (in Betty 0.1.x) the point before it knows of a
        param_callback.
        """
        params = self._parameters()
        if self._offered and self._saved("offered_at", math.nan) == self._fingerprint(points):
            points = [self.state.get(p, {}).get("offered", point) for p, point in zip(params, points, strict=True)]
        if self._seat is not None and self._seat.projects:
            self._seat.project(params)
            points = [point.clone() for point in points]
            self._seat.project(points)
        super().offer(points)


class _HostedSearch(Hosted):
    """A line search along what the problem's param_callback leaves of a direction."""

    def _descent(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Descent:
        """Return the direction; where param_callback cuts it short, to the point that it projects to.

        Sufficient decrease along -g cannot be had where the projection takes a part of g away.
        """
        descent, seat = super()._descent(params, grads), self._seat
        if not self._hosted or seat is None or not seat.projects:
            return descent
        by_parameter = dict(zip(self._parameters(), self._each_factor(), strict=True))
        factors = [by_parameter[p] for p in params]

        def precondition(g: Sequence[Tensor]) -> list[Tensor]:
            directions = [d if w == 1.0 else d * w for d, w in zip(descent.precondition(g), factors, strict=True)]
            slope = sum(float((a * b).sum()) for a, b in zip(g, directions, strict=True))
            bound, scale = self._bound()
            value, rule = float(seat.replay.loss), cast(Search, self.policy)
            longest = rule.first_trial(self._rule_state(), loss=value, slope=slope, bound=bound, scale=scale)
            if not (math.isfinite(longest) and longest > 0.0 and math.isfinite(slope)):
                return descent.precondition(g)
            listed = self._parameters()
            section = Section.of(seat.project, listed, params, factors)
            going = Move(list(params), list(g), directions, None, factors=factors).within(listed, section, longest)
            return [d if w in (0.0, 1.0) else d / w for d, w in zip(going.along, factors, strict=True)]

        return descent._replace(precondition=precondition)


class SPSMax(Hosted, core.SPSMax):
    """`adaptive_bilevel.SPSMax` as a problem's optimizer: the same options, and ``step()`` after `bind`."""


class DecSPS(Hosted, core.DecSPS):
    """`adaptive_bilevel.DecSPS` as a problem's optimizer: the same options, and ``step()`` after `bind`."""


class SPSB(Hosted, core.SPSB):
    """`adaptive_bilevel.SPSB` as a problem's optimizer: the same options, and ``step()`` after `bind`."""


class SLS(_HostedSearch, core.SLS):
    """`adaptive_bilevel.SLS` as a problem's optimizer: the same options, and ``step()`` after `bind`."""


class SLSB(_HostedSearch, core.SLSB):
    """`adaptive_bilevel.SLSB` as a problem's optimizer: the same options, and ``step()`` after `bind`."""
