"""What an upper step does where the upper loss leaves all of its recent values: x and y go back.

A search certifies a step for a y that stays on its tangent. The lower level of a network can have other minima, and a
step of x can open the way to one: then y leaves within one lower loop, and f with it. A meta-weight-net, say, can give
all samples that the network does not fit the weight 0; what is left of the lower loss is its ridge, y goes to 0, and no
hypergradient leads back from there. The upper step sees it by the next value of f.

In ``examples/benchmarks/NOTES.md``, 2 of 24 runs of a meta-weight-net ended at the loss of a constant network, 2.30.
Now all end at .15 to .24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple, final

from torch import Tensor

from ..evaluation import foreach
from ..evaluation.attempts import Attempts
from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner
from ..hypergradient.loop_time import last_limit, observed
from ..hypergradient.solution import HessianReport
from ..optim.state import RoleState
from .between_steps import BetweenSteps
from .context import Point
from .scale import visible

__all__ = ["Anchor", "Retreat"]

_RECENT = 16
"""Number of values of f that count as recent."""

_ENOUGH = 8
"""Number of values below which their spread is taken for less than what f varies by."""

_FEW = 4
"""Number of values below which nothing is judged."""

_CALMER = 3
"""Number of earlier points that are kept where it is not known at which curvature the lower loop diverges."""


class Anchor(NamedTuple):
    """A point of the run.

    Attributes:
        tensors: Copies of those of x that had a hypergradient, and then of those of y.
        value: f there.
        length: The step before it.
        norm: The largest absolute eigenvalue of the lower Hessian there, as far as is known; 0 where it is not.
    """

    tensors: Sequence[Tensor]
    value: float
    length: float
    norm: float


@final
class Retreat:
    """Goes back where f is above all of its recent values by more than they differ from each other.

    With low and high the least and the greatest f of the last n upper steps, 4 <= n <= 16, and f_0 the first of
    all, x and y go back to the last point where f was at or below the median of the values before it, if

        f > high + s,    f > (f_0 + low) / 2,    f - f' > s,    s = max{1, 8 / n}^2 (high - low),

    where f' is the loss of the present sample at that point. The first condition finds an unusual f. The second
    asks that half of the decrease since f_0 is lost. The third costs one value, and is evaluated only if the others
    hold: it fails if this sample is harder than the last ones, or if the losses have changed. The step also goes on
    if h is zero in the entries that make up half of the move of x since that point, which happens where each sample
    depends on its own part of x. If y is not finite, it is enough that f' is. After a return, the search starts
    from shrink^2 times the shorter of the two lengths, there and now.

    A lower loop of `torch.optim.SGD` diverges where a step of x makes the lower loss too steep for it. So a point
    with an eigenvalue of the lower Hessian above 2 (1 + momentum) / lr takes the place of another such point only. If
    the limit is not known, because the loop is of the user's code, up to three earlier points are kept as well, each
    with at most half of the largest eigenvalue of the next one. If the last point is as steep as the present one, or
    was gone back to before, x and y go back to the last of these with at most half of the present eigenvalue.

    The state has "losses", the recent values, and "first". The point is no part of it, and not saved: a run that is
    resumed has one from the next f on that is at or below the median.
    """

    def __init__(self) -> None:
        self.forget()

    @staticmethod
    def init() -> RoleState:
        """Return the state before the first step."""
        return RoleState({"losses": []})

    def forget(self) -> None:
        """Drop the point, since a host or a level above has moved x or y."""
        self._anchor: Anchor | None = None
        self._calmer: list[Anchor] = []
        self._norm, self._used = 0.0, False

    def propose(self, point: Point, between: BetweenSteps, state: RoleState) -> Anchor | None:
        """Return the point to go back to, or None if the step goes on.

        Args:
            point: Where the step begins.
            between: What has happened to x since the last step.
            state: See the class.
        """
        anchor, losses, tensors = self._chosen(), state.shared["losses"], [*point.gradient.tensors, *point.lower]
        finite = math.isfinite(point.value)
        if anchor is None or (len(losses) < _FEW if finite else _are_finite(point.lower)):
            return None
        low, high = min(losses), max(losses)
        spread = max(1.0, _ENOUGH / len(losses)) ** 2 * (high - low)
        if finite and not point.value > max(high + spread, 0.5 * (state.shared["first"] + low)):
            return None
        if between.elsewhere or [t.shape for t in tensors] != [t.shape for t in anchor.tensors]:
            self.forget()
            return None
        if finite and not _concerns(point, anchor):
            return None
        there = self._loss(point, anchor, tensors)
        gained = point.value - there
        lower = gained > spread and visible(gained, point.value, point.rounding)
        if not (lower if finite else math.isfinite(there)):
            return None
        self._anchor, self._norm, self._used = anchor, anchor.norm, True
        self._calmer = [earlier for earlier in self._calmer if earlier.norm <= anchor.norm]
        return anchor

    def _chosen(self) -> Anchor | None:
        """Return the point to go back to, if any."""
        if self._anchor is None or not self._calmer or (self._anchor.norm < self._norm and not self._used):
            return self._anchor
        return next((p for p in reversed(self._calmer) if 2.0 * p.norm <= self._norm), self._calmer[0])

    @staticmethod
    def _loss(point: Point, anchor: Anchor, tensors: Sequence[Tensor]) -> float:
        """Return the loss of the present sample there."""

        def evaluate() -> Tensor | float:
            foreach.copy_(tensors, anchor.tensors)
            point.counts.upper.values += 1
            return point.guard.value(point.objective, point.guard.entry)

        point.guard.put_back()
        there = float(Attempts().value(evaluate))
        point.guard.put_back()
        return there

    @staticmethod
    def length(anchor: Anchor, previous: float, shrink: float) -> float:
        """Return the length from which searches go on after a return, `previous` being the last one."""
        return min(anchor.length, previous) * shrink**2

    @staticmethod
    def returned(anchor: Anchor, state: RoleState) -> RoleState:
        """Return what is new in the state after a return: losses above that of the point do not count any more."""
        known = [value for value in state.shared["losses"] if value <= anchor.value]
        return RoleState({"losses": known or [anchor.value]})

    @staticmethod
    def message(value: float, state: RoleState) -> str:
        """Return what is said of a return."""
        losses = state.shared["losses"]
        return (
            f"the upper loss was {value:.4g} after the lower steps, and {min(losses):.4g} to {max(losses):.4g} in the "
            f"{len(losses)} steps before, so the lower variable has left the minimum that it had followed. Both levels "
            "went back to an earlier point, and the next upper step is shorter. If this comes again, let SLS find the "
            "lower steps, take more of them, or see whether x can take all curvature from the lower loss"
        )

    def commit(
        self, point: Point, before: Callable[[], list[Tensor]], state: RoleState, hessian: HessianReport | None
    ) -> RoleState:
        """Return what is new in the state after a step.

        Args:
            point: Where it began.
            before: Returns x at that point, for the tensors that have a hypergradient, and then y.
            state: See the class.
            hessian: What the step has seen of the lower Hessian.
        """
        value, losses = point.value, state.shared["losses"]
        limit = last_limit(point.lower)
        self._norm = 0.0 if hessian is None or math.isnan(hessian.norm) else hessian.norm
        stable = self._norm <= limit
        if not losses or (value <= median(losses) and (stable or not (self._anchor and self._anchor.norm <= limit))):
            self._anchor, self._used = Anchor(before(), value, float(point.scale.previous), self._norm), False
            if observed(point.lower) is not None and self._norm > 0.0:
                self._keep(self._anchor)
        return RoleState({"losses": [*losses, value][-_RECENT:], **({} if losses else {"first": value})})

    def _keep(self, anchor: Anchor) -> None:
        """Keep the last points whose norms are each twice that of the one before, at most."""
        while self._calmer and self._calmer[-1].norm >= anchor.norm:
            self._calmer.pop()
        if not self._calmer or anchor.norm >= 2.0 * self._calmer[-1].norm:
            self._calmer = [*self._calmer, anchor][-_CALMER:]


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    (square,) = on_host(inner(tensors, tensors))
    return math.isfinite(square)


def _concerns(point: Point, anchor: Anchor) -> bool:
    """Return whether the present sample depends on at least half of the move of x since then."""
    h = point.gradient.values
    moves = foreach.sub([p.detach() for p in point.gradient.tensors], list(anchor.tensors[: len(h)]))
    seen = [move * (values != 0) for move, values in zip(moves, h, strict=True)]
    part, whole = on_host(inner(seen, moves), inner(moves, moves))
    return 0.0 < whole <= 2.0 * part
