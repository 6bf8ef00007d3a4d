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
from ..hypergradient.solution import HessianReport
from ..optim.state import RoleState
from ..policies.loss_range import spread
from .between_steps import BetweenSteps
from .context import Point
from .scale import visible

__all__ = ["Anchor", "Retreat", "half_lost"]

_RECENT = 16
"""Number of values of f that count as recent."""

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
    all, x and y go back to an earlier point if

        f > high + r s,    f > sqrt(f_0 low),    f - f' > r s,    s = max{1, 8 / n}^2 (high - low),

    where f' is the loss of the present sample at that point, and r is 1 if the value before was above high + s as
    well, and 2 otherwise. The first condition finds an unusual f. The second asks that half of the decrease of log f
    since f_0 is lost; if f_0 or low is not positive, the limit is (f_0 + low) / 2. The third costs one value, and is
    evaluated only if the others hold: it fails if this sample is harder than the last ones, or if the losses have
    changed. The step also goes on if h is zero in the entries that make up half of the move of x since that point,
    which happens where each sample depends on its own part of x. If y is not finite, it is enough that f' is. After a
    return, the search starts from shrink^2 times the shorter of the two lengths, there and now.

    Values above high + s are set aside. They count as recent as soon as f is back, or when there are 16 of them. (f may
    leave in many small steps, each of which is usual beside the one before.)

    The point is one where f was at or below the median of the values before it. y follows x with a delay, so x may
    already be at fault there. Two points are kept, n / 2 steps apart at least, and the newer one is the point to go
    back to if n / 2 steps without such a value have followed it.

    A lower loop of `torch.optim.SGD` diverges where a step of x makes the lower loss too steep for it. So a point
    with an eigenvalue of the lower Hessian above 2 (1 + momentum) / lr takes the place of another such point only. If
    the limit is not known, because the loop is of the user's code, up to three earlier points are kept as well, each
    with at most half of the largest eigenvalue of the next one. If the last point is as steep as the present one, or
    was gone back to before, x and y go back to the last of these with at most half of the present eigenvalue.

    The state has "losses", the recent values, "aside", and "first". The points are no part of it, and not saved: a run
    that is resumed has one from the next f on that is at or below the median.
    """

    def __init__(self) -> None:
        self.forget()

    @staticmethod
    def init() -> RoleState:
        """Return the state before the first step."""
        return RoleState({"losses": [], "aside": []})

    def forget(self) -> None:
        """Drop the points, since a host or a level above has moved x or y."""
        self._points: list[Anchor] = []
        self._age = 0
        self._calmer: list[Anchor] = []
        self._norm, self._used = 0.0, False

    def propose(self, point: Point, between: BetweenSteps, state: RoleState) -> Anchor | None:
        """Return the point to go back to, or None if the step goes on.

        Args:
            point: Where the step begins.
            between: What has happened to x since the last step.
            state: See the class.
        """
        losses, tensors = state.shared["losses"], [*point.gradient.tensors, *point.lower]
        anchor = self._chosen(len(losses))
        finite = math.isfinite(point.value)
        if anchor is None or (len(losses) < _FEW if finite else _are_finite(point.lower)):
            return None
        varies = _spread(losses) * (1.0 if state.shared["aside"] else 2.0)
        if finite and not point.value > max(max(losses) + varies, half_lost(state.shared["first"], min(losses))):
            return None
        if between.elsewhere or [t.shape for t in tensors] != [t.shape for t in anchor.tensors]:
            self.forget()
            return None
        if finite and not _concerns(point, anchor):
            return None
        there = self._loss(point, anchor, tensors)
        gained = point.value - there
        lower = gained > varies and visible(gained, point.value, point.rounding)
        if not (lower if finite else math.isfinite(there)):
            return None
        self._points, self._age, self._norm, self._used = [anchor], 0, anchor.norm, True
        self._calmer = [earlier for earlier in self._calmer if earlier.norm <= anchor.norm]
        return anchor

    def _chosen(self, recent: int) -> Anchor | None:
        """Return the point to go back to, if any."""
        if not self._points:
            return None
        last = self._points[-1 if 2 * self._age >= recent else 0]
        if not self._calmer or (last.norm < self._norm and not self._used):
            return last
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
        return RoleState({"losses": known or [anchor.value], "aside": []})

    @staticmethod
    def message(point: Point, state: RoleState) -> str:
        """Return what is said of a return."""
        losses = state.shared["losses"]
        seen = f"{point.value:.4g}{{}}, and {min(losses):.4g} to {max(losses):.4g} in the {len(losses)} steps before"
        if not point.lower:
            return (
                f"the upper loss was {seen.format('')}, so the last steps were too long, or this sample is "
                "unusual. x went back to an earlier point, and the next step is shorter. If this comes again, use "
                "larger samples"
            )
        return (
            f"the upper loss was {seen.format(' after the lower steps')}, so the lower variable has left the minimum "
            "that it had followed. Both levels went back to an earlier point, and the next upper step is shorter. If "
            "this comes again, let SLS find the lower steps, take more of them, or see whether x can take all "
            "curvature from the lower loss"
        )

    def commit(
        self,
        point: Point,
        before: Callable[[], list[Tensor]],
        state: RoleState,
        hessian: HessianReport | None,
        limit: float | None,
    ) -> RoleState:
        """Return what is new in the state after a step.

        Args:
            point: Where it began.
            before: Returns x at that point, for the tensors that have a hypergradient, and then y.
            state: See the class.
            hessian: What the step has seen of the lower Hessian.
            limit: The largest eigenvalue at which lower steps do not diverge; None: not known.
        """
        value, losses, aside = point.value, state.shared["losses"], state.shared["aside"]
        usual = len(losses) < _FEW or value <= max(losses) + _spread(losses)
        most = math.inf if limit is None else limit
        self._norm = 0.0 if hessian is None or math.isnan(hessian.norm) else hessian.norm
        self._age += usual
        if not losses or (value <= median(losses) and self._is_due(len(losses), most)):
            anchor = Anchor(before(), value, float(point.scale.previous), self._norm)
            older = [last for last in self._points[-1:] if (last.norm <= most) == (anchor.norm <= most)]
            self._points, self._age, self._used = [*older, anchor], 0, False
            if limit is None and self._norm > 0.0:
                self._keep(anchor)
        if not usual and len(aside) < _RECENT - 1:
            return RoleState({"aside": [*aside, value]})
        recent = [*losses, *aside, value][-_RECENT:]
        return RoleState({"losses": recent, "aside": [], **({} if losses else {"first": value})})

    def _is_due(self, recent: int, limit: float) -> bool:
        """Return whether a point is to be taken, by its age and by the norms of the present one and of the last."""
        if not self._points:
            return True
        stable, before = self._norm <= limit, self._points[-1].norm <= limit
        return (stable and not before) or (stable == before and 2 * self._age >= recent)

    def _keep(self, anchor: Anchor) -> None:
        """Keep the last points whose norms are each twice that of the one before, at most."""
        while self._calmer and self._calmer[-1].norm >= anchor.norm:
            self._calmer.pop()
        if not self._calmer or anchor.norm >= 2.0 * self._calmer[-1].norm:
            self._calmer = [*self._calmer, anchor][-_CALMER:]


def half_lost(first: float, low: float) -> float:
    """Return sqrt(first low), where half of the decrease of the logarithm is lost; the mean if one is not positive.

    >>> half_lost(4.0, 1.0), half_lost(4.0, -1.0)
    (2.0, 1.5)
    """
    return math.sqrt(first) * math.sqrt(low) if min(first, low) > 0.0 else 0.5 * (first + low)


def _spread(losses: Sequence[float]) -> float:
    """Return by how much recent values vary."""
    return spread(min(losses), max(losses), len(losses))


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
