"""Which direction is searched where the upper loss is one and the same function of x in every step: that of L-BFGS.

A search ends at a value of f. Without a lower level, the next step begins where it ended. If f is the same function
there (no batch is drawn, nothing in the closure moves), its value is the same, up to rounding; if it is not, the values
differ by about as much as f falls. So the losses themselves show whether there is one function, at no cost. Then the
change of the hypergradient along a step is that of the Hessian, and a few such pairs give a quasi-Newton direction,
which the search certifies as it does every other.

Measured (``examples/benchmarks/NOTES.md``): a port of hypertorch's equilibrium models ends at 1e-8, .066 along h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from ..evaluation import foreach
from ..evaluation.reductions import on_host
from ..evaluation.vectors import cast_like, inner, inners, rounding, widen
from ..optim.direction import Gradient
from ..optim.search_path import SearchPath, scaled
from ..optim.state import RoleState
from ..policies import Record
from ..policies.agreement import identical, unconfirmed
from .context import Point
from .last_step import FROM
from .momentum import Predictive
from .roles import Momentum, Pace
from .scale import visible

__all__ = ["Lead", "Secants", "Seen"]

_PAIRS = 5
"""Pairs kept. Liu and Nocedal (1989) recommend 3 to 7."""

_NONE = {"decrease": 0.0, "pairs": 0}

Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


class Lead(NamedTuple):
    """A direction to search in place of A^{-1} h.

    Attributes:
        path: x - a d. d is as long as A^{-1} h.
        start: The quasi-Newton step along it, which is the first trial.
        length: The least length along A^{-1} h that a pair shows, <s, y> / <y, A^{-1} y>.
    """

    path: SearchPath
    start: float
    length: float


class Seen(NamedTuple):
    """What a step has seen before its search.

    Attributes:
        shared: What is new of the shared state.
        pair: The last move of x, and the change of h along it; None if it is not used.
        lead: The direction to search; None: A^{-1} h.
    """

    shared: Mapping[str, Any]
    pair: Pair | None = None
    lead: Lead | None = None


@final
class Secants:
    """The direction of L-BFGS, where losses show that f is one function of x.

    With A_j = f(x_j) - f(x_{j+1}), as the search along the step has evaluated it, and u the rounding unit of f, it is
    where

        sum_j min{|f_{j+1}(x_{j+1}) - f_j(x_{j+1})|, A_j}  <=  sqrt(u) sum_j A_j,

    that is, to half of the digits. The sums are over the steps that were taken as they were searched, so not over those
    along a mixture with the mean.

    The direction is d = H h. H is the inverse that the last five pairs s = x_{j+1} - x_j, y = h_{j+1} - h_j give by the
    updates of BFGS, beginning with <s, y> / <y, A^{-1} y> A^{-1} (Nocedal and Wright, Numerical Optimization,
    algorithm 7.4). A pair is used if <s, y> is positive by more than its rounding, and if the decrease that was asked
    of its step, c a <h, d>, is above the rounding of f. The first trial is the step d. Entries that a convex
    set does not let move along A^{-1} h are left out of h, s and y. If what that promises is not
    above the rounding of f, or a convex set leaves less than half of its slope, the step is along h, and the length
    that searches along h go on from is the least <s, y> / <y, A^{-1} y> of the pairs. All pairs are dropped after a
    search that failed, and if d does not descend.

    The state has "differing" and "decreases", the two sums; of the last step "expected", the value that its search
    ended at, "decrease", what f fell by (0: nothing is to be compared), and "fresh", whether it may be a pair; "pairs",
    the number of pairs since they were dropped, and per parameter "move0", "change0" and so on.

    Args:
        c: The constant of the test of decrease.
    """

    def __init__(self, c: float) -> None:
        self._c = c

    @staticmethod
    def init() -> RoleState:
        """Return the state before the first step."""
        return RoleState({"differing": 0.0, "decreases": 0.0, "expected": 0.0, "fresh": False, **_NONE})

    @staticmethod
    def nothing() -> RoleState:
        """Return what is new where x was put elsewhere: the next f is compared with nothing."""
        return RoleState({"decrease": 0.0, "fresh": False})

    @staticmethod
    def apply(point: Point, momentum: Momentum, pace: Pace) -> bool:
        """Return whether past steps may show a direction.

        There is no lower level, a search is made in every step, and what is stepped along is to be found
        (``momentum="auto"``).
        """
        return isinstance(momentum, Predictive) and not (point.lower or pace.keeps)

    def propose(self, point: Point, path: SearchPath, states: Mapping[str, RoleState]) -> Seen:
        """Return what the present f and h say.

        Args:
            point: Where the step begins.
            path: The path along A^{-1} h, as a convex set has left it.
            states: Those of the roles. The last step has left x in one of its own, and the momentum h.
        """
        state, momenta = states["secants"], states["momentum"].each
        before = [{**step, **own} for step, own in zip(states["last_step"].each, momenta, strict=True)]
        sums, saved = self._compared(point, state.shared), state.shared
        if not identical(sums["differing"], sums["decreases"], point.rounding):
            return Seen({**sums, "pairs": 0})
        pairs, new = self._known(state), None
        if saved["fresh"] and all(FROM in own and "last" in own for own in before):
            new = _pair(path.gradient, before)
            pairs = [*pairs, *([new] if new is not None else [])][-_PAIRS:]
        lead = _lead(path, pairs) if pairs else None
        if lead is None:
            return Seen({**sums, "pairs": 0})
        shown = visible(lead.start * lead.path.promised, point.value, point.rounding)
        count = saved["pairs"] if len(pairs) > (new is not None) else 0
        return Seen({**sums, "pairs": count + (new is not None)}, new, lead if shown else None)

    def commit(self, seen: Seen | None, point: Point, record: Record, searched: bool, whole: bool) -> RoleState:
        """Return what is new in the state after a step.

        Args:
            seen: What `propose` has returned; None: it was not asked.
            point: Where the step began.
            record: Its record.
            searched: Whether it was searched.
            whole: Whether the step that was taken is the searched one.
        """
        news = dict(self.nothing().shared)
        if seen is None:
            return RoleState(news)
        news = {**seen.shared, **news}
        if not record.moved:
            return RoleState({**news, "pairs": 0})
        if searched:
            asked = self._c * record.step_size * record.slope
            news["fresh"] = visible(asked, point.value, point.rounding)
        if searched and whole:
            news |= {"expected": float(record.value), "decrease": max(point.value - float(record.value), 0.0)}
        if seen.pair is None:
            return RoleState(news)
        at = (news["pairs"] - 1) % _PAIRS
        return RoleState(news, [{f"move{at}": s, f"change{at}": y} for s, y in zip(*seen.pair, strict=True)])

    @staticmethod
    def _compared(point: Point, saved: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums with the present f in them."""
        last = saved["decrease"]
        if not last > 0.0:
            return {name: saved[name] for name in ("differing", "decreases")}
        differing = unconfirmed(point.value, saved["expected"], last, point.rounding)
        return {"differing": saved["differing"] + differing, "decreases": saved["decreases"] + last}

    @staticmethod
    def _known(state: RoleState) -> list[Pair]:
        """Return the pairs, the oldest first; none where a parameter has come later."""
        count = state.shared["pairs"]
        places = [j % _PAIRS for j in range(max(0, count - _PAIRS), count)]
        if not all(f"move{j}" in own for own in state.each for j in places):
            return []
        return [([own[f"move{j}"] for own in state.each], [own[f"change{j}"] for own in state.each]) for j in places]


def _pair(gradient: Gradient, before: Sequence[Mapping[str, Any]]) -> Pair | None:
    """Return the last move of x and the change of h along it, if h has grown along it by more than rounding."""
    x, h = widen(gradient.tensors), widen(gradient.values)
    last = widen([own["last"] for own in before])
    move, change = foreach.sub(x, widen([own[FROM] for own in before])), foreach.sub(h, last)
    sizes = [a.abs() + b.abs() for a, b in zip(h, last, strict=True)]
    curvature, size = on_host(*inners((move, change), ([s.abs() for s in move], sizes)))
    return (move, change) if curvature > rounding(gradient.values) * size else None


def _lead(path: SearchPath, pairs: Sequence[Pair]) -> Lead | None:
    """Return the direction that the pairs give; None if it does not descend."""
    gradient, h = path.gradient, list(widen(path.gradient.values))
    if path.cut:  # the entries that the set lets move, as two-metric projections (Bertsekas, 1982) have it
        free = [(d != 0).to(g.dtype) for d, g in zip(path.along, h, strict=True)]
        h, pairs = foreach.mul(h, free), [(foreach.mul(s, free), foreach.mul(y, free)) for s, y in pairs]

    def metric(tensors: Sequence[Tensor]) -> list[Tensor]:
        return scaled(path.descent.precondition(tensors), gradient.factors)

    scaling = [(change, widen(metric(change))) for _, change in pairs]
    products = on_host(*inners(*pairs, *scaling))
    del scaling
    found = zip(pairs, products[: len(pairs)], products[len(pairs) :], strict=True)
    used = [(*pair, curvature, square) for pair, curvature, square in found if min(curvature, square) > 0.0]
    if not used:
        return None
    lengths = [curvature / square for *_, curvature, square in used]
    q, shares = h, list[float]()
    for move, change, curvature, _ in reversed(used):
        shares.append(on_host(inner(move, q))[0] / curvature)
        q = foreach.add(q, change, alpha=-shares[-1])
    d = foreach.mul(widen(metric(q)), lengths[-1])
    for (move, change, curvature, _), share in zip(used, reversed(shares), strict=True):
        d = foreach.add(d, move, alpha=share - on_host(inner(change, d))[0] / curvature)
    ours, theirs = (math.sqrt(max(square, 0.0)) for square in on_host(*inners((d, d), (path.along, path.along))))
    if not (0.0 < ours < math.inf and 0.0 < theirs < math.inf):
        return None
    along = list(cast_like(foreach.mul(d, theirs / ours), gradient.values))
    led = SearchPath(gradient, along, path.descent, replaced=True)
    return Lead(led, ours / theirs, min(lengths)) if 0.0 < led.promised < math.inf else None
