"""The Pace role: is a search due?

| ``pace=`` | class | a search is made |
|---|---|---|
| "every" | `EveryStep` | in every step, except where no trial could tell anything: the default |
| "auto" | `AsLengthsAgree` | where it is cheap in every step, else as rarely as the lengths that searches find agree |

An upper search with a linear solve of its own costs about as much as its hypergradient. A step whose length is kept
from the last search costs one value of f. Where the hypergradient has left its inverse (`implicit` and `BiSLS` with the
same `Lanczos`, the default), a search costs a product and its trials, a sixth of the iteration, and is made in every
step. With momentum=False, a search certifies every step, and none is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from ..evaluation.reductions import on_host
from ..evaluation.vectors import fingerprint
from ..optim.state import RoleState
from ..policies import Outcome, Record
from ..policies.agreement import agreeing, unconfirmed
from .context import PaceContext
from .roles import Pace
from .sample_signature import signature

__all__ = ["Always", "AsLengthsAgree", "EveryStep", "pace_of"]

_MOST = 8
"""The largest gap: one search in so many steps."""

_RECENT = 2 * _MOST
"""Number of values of f that count as recent."""

_STEEPER = 4.0
"""A search is due where <h, d> is above this multiple of that of the last search."""

_LATE = 0.25
"""f falls late where kept steps have less than this multiple of the falls of searched ones, for the same promise."""

_NOWHERE = -1.0
"""No ||x||^2."""

_EDGE = 1e-6
"""Relative rounding of a quotient of lengths."""


class _Searching:
    """A pace that keeps no length over any distance: it has no state, and nothing to regret."""

    keeps = False

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def due(self, context: PaceContext, state: RoleState) -> bool:
        """Return True."""
        return True

    def regrets(self, context: PaceContext, state: RoleState) -> Sequence[Tensor] | None:
        """Return None."""
        return None

    def commit(self, context: PaceContext, record: Record, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class EveryStep(_Searching):
    """A search in every step, except where no trial could tell anything.

    Where what the last step length promises is lost in the rounding of f, solves would be for slopes of either sign,
    and steps would grow or shrink by chance. The step is then as long as the last one that was searched.
    """

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        """Return the last step where the run has stalled, else None."""
        return _stalled(context)


@final
class Always(_Searching):
    """A search in every step, whatever it could tell: the paper's."""

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        """Return None."""
        return None


@final
class AsLengthsAgree:
    """A search in every gap-th step, with a gap of 1, 2, 4, up to 8, as the lengths that searches find agree.

    In between, the length of the last search is kept, a_s say, or shortened:

        a = a_s min{1, sqrt(<h, d>_s / <h, d>)}.

    So the step is never longer than the one that was certified, in the metric of the direction, a sqrt(<h, d>). It
    takes one value of f, no product and no trial. The next f tests a kept step. The lower level moves f, too, so the
    fall of f, over a <h, d>, is compared with that of the last 16 steps. If f is not finite, or its fall is below c (by
    more than rounding) and further below the least of the 16 than the greatest is above it, then x and y go back to
    before that step, to the bit, and the next step is searched.

    The gap doubles with each search that finds a length between shrink and 1/shrink times the one that would have been
    kept: searches know no length any better. A longer one leaves it as it is (the search starts as much longer as
    searches in all of these steps would have), a shorter one makes it 1, and so do a search that fails, a step that is
    undone, and samples that do not agree: the next values of f do not confirm half of the decreases that searches have
    seen (`adaptive_bilevel.policies.agreement`), or f falls by less than the tests of the steps require
    (`adaptive_bilevel.policies.margin`). The right length then differs from sample to sample.

    Where the lower steps are few, y lags: f falls later than the step of x that is the cause. A search moves y along by
    its tangent, a kept step by a part of an old one. So a search is due while, over the last 16 steps, the falls of f
    after kept steps are less than a quarter of those after searched steps, each sum over the sum of its promises.

    A search is due at once, too, if it needs no solve of its own; if no trial was rejected yet; if f is not finite or
    above all of the last 16 values, or <h, d> above four times that of the last search; if the slope that this found
    was not <h, d>, up to 1/shrink (h and the tangent disagree, along a wrong hypergradient or far from a solution of
    the linear systems, so its length says nothing of h); if lr, or the number of entries of h that are not zero, has
    changed by more than 1/shrink since then; and if the closures of either level have other code or tensors of other
    sizes (`adaptive_bilevel.bilevel.sample_signature`), or the parameters are others.

    The state has, of the last search, "step" (a_s), "promised" (<h, d>_s), "lr", "entries" and "sample"; "gap", and
    "since", the steps kept since; of the last 16 steps, "losses", "falls" (relative to the promise), "promises" and
    "kept" (whether it was); "differing" and "decreases", the sums of `agreement`, and "margin"; of the last step,
    "expected" and "decrease" for them, "promise" (a <h, d>), "undone", whether it was, and, if it was kept, "at"
    (||x||^2 after it), "below", y before it, and per parameter "before", x before it.
    """

    keeps = True

    def init(self) -> RoleState:
        """Return the state before the first step: a search is due."""
        sums = {"differing": 0.0, "decreases": 0.0, "margin": 0.0, "decrease": 0.0, "promise": 0.0}
        recent: dict[str, Any] = {"losses": [], "falls": [], "promises": [], "kept": []}
        return RoleState({"gap": 1, "since": 0, "undone": False, **recent, **sums})

    def due(self, context: PaceContext, state: RoleState) -> bool:
        """Return whether a search is due whatever f is."""
        saved, promised = state.shared, context.path.promised
        if context.solved or "step" not in saved or saved["undone"] or saved["since"] + 1 >= saved["gap"]:
            return True
        if not (context.scale.rejected and _agree(saved)) or _late(saved):
            return True
        if not 0.0 < promised <= _STEEPER * saved["promised"]:
            return True
        entries, sample = _signs(context)
        pairs = (context.lr, saved["lr"]), (entries, saved["entries"])
        return sample != saved["sample"] or not all(_alike(*pair, context.policy.shrink) for pair in pairs)

    def regrets(self, context: PaceContext, state: RoleState) -> Sequence[Tensor] | None:
        """Return x and y before the last step, if that was kept and is to be undone, and x is where it was put."""
        saved = state.shared
        if saved.get("at", _NOWHERE) == _NOWHERE or not self._failed(context, saved):
            return None
        if saved["at"] != fingerprint(context.path.gradient.tensors) or not all("before" in own for own in state.each):
            return None
        return [*(own["before"] for own in state.each), *saved["below"]]

    @staticmethod
    def _failed(context: PaceContext, saved: Mapping[str, Any]) -> bool:
        """Return whether f says that the last step should not have been taken."""
        f, promise = context.value, saved["promise"]
        if not math.isfinite(f):
            return True
        fall: float = saved["losses"][-1] - f
        visible = fall + context.rounding * abs(f) < context.policy.c * promise
        low, high = min(saved["falls"]), max(saved["falls"])
        return bool(visible and fall < (low - (high - low)) * promise)

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        """Return the length to keep, or None if a search is due."""
        still = None if state.shared["undone"] else _stalled(context)
        if still is not None or context.due:
            return still
        if not (context.value <= max(state.shared["losses"]) and _agree(_compared(context, state.shared))):
            return None
        return _kept(context, state.shared)

    def commit(self, context: PaceContext, record: Record, state: RoleState) -> RoleState:
        """Return the state with this step in it."""
        saved, f, promised = state.shared, context.value, context.path.promised
        news: dict[str, Any] = {"at": _NOWHERE, "decrease": 0.0, "promise": context.part * record.step_size * promised}
        if record.outcome in (Outcome.undone, Outcome.returned):
            return RoleState({**news, "promise": 0.0, "gap": 1, "since": 0, "undone": True})
        news["undone"] = False
        sums = _compared(context, saved)
        news |= sums
        news["losses"] = [*saved["losses"], f][-_RECENT:]
        step: dict[str, Any] = {}
        if saved["promise"] > 0.0:
            promise, kept = saved["promise"], saved["at"] != _NOWHERE
            step = {"falls": (saved["losses"][-1] - f) / promise, "promises": promise, "kept": kept}
        for name in ("falls", "promises", "kept"):
            news[name] = [*saved[name], *([step[name]] if step else [])][-_RECENT:]
        along_h = _alike(record.slope_ratio, 1.0, context.policy.shrink)
        if not record.moved or context.solved or (record.outcome != Outcome.kept and not along_h):
            return RoleState({**news, "gap": 1, "since": 0})
        if record.outcome == Outcome.kept:
            news |= {"since": saved["since"] + 1, "at": fingerprint(context.path.gradient.tensors)}
            before, count = context.before(), len(context.path.gradient.tensors)
            return RoleState({**news, "below": before[count:]}, [{"before": p} for p in before[:count]])
        entries, sample = _signs(context)
        gap = self._gap(record.step_size, context, saved) if _agree(sums) else 1
        news |= {"gap": gap, "since": 0, "step": record.step_size, "promised": promised}
        news |= {"lr": context.lr, "entries": entries, "sample": sample}
        seen = max(f - record.value, 0.0) if context.part == 1.0 else 0.0  # else that step was not taken
        return RoleState({**news, "expected": record.value, "decrease": seen})

    @staticmethod
    def _gap(found: float, context: PaceContext, saved: Mapping[str, Any]) -> int:
        """Return the gap after a search has found a length."""
        gap: int = saved["gap"]
        kept = _kept(context, saved) if "step" in saved else math.inf
        if _alike(found, kept, context.policy.shrink):
            return min(2 * gap, _MOST)
        return gap if found > kept else 1


def _stalled(context: PaceContext) -> float | None:
    """Return the last step where what it promises is lost in the rounding of f, else None."""
    scale = context.scale
    hidden = scale.stalled(context.path.promised, context.value, context.rounding)
    return scale.previous if hidden else None


def _kept(context: PaceContext, saved: Mapping[str, Any]) -> float:
    """Return the length of a kept step."""
    length: float = saved["step"] * min(1.0, math.sqrt(saved["promised"] / context.path.promised))
    return length


def _alike(one: float, other: float, shrink: float) -> bool:
    """Return whether two numbers differ by no more than a search can tell of lengths."""
    return shrink * (1.0 - _EDGE) * other <= one <= (1.0 + _EDGE) / shrink * other


def _compared(context: PaceContext, saved: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums that say whether samples agree, with f in them, which follows the last step."""
    sums = {name: saved[name] for name in ("differing", "decreases", "margin")}
    f, last = context.value, saved["decrease"]
    if saved["promise"] > 0.0 and math.isfinite(f):
        before = saved["losses"][-1]
        sums["margin"] += before - f - context.policy.c * saved["promise"] + context.rounding * abs(before)
    if last > 0.0 and math.isfinite(f):
        sums["differing"] += unconfirmed(f, saved["expected"], last, context.rounding)
        sums["decreases"] += last
    return sums


def _agree(sums: Mapping[str, float]) -> bool:
    """Return whether samples agree."""
    return agreeing(sums["differing"], sums["decreases"]) and sums["margin"] >= 0.0


def _late(saved: Mapping[str, Any]) -> bool:
    """Return whether f falls later than kept steps."""
    falls, promises = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for fall, promise, kept in zip(saved["falls"], saved["promises"], saved["kept"], strict=True):
        falls[kept] += fall * promise
        promises[kept] += promise
    if min(promises.values()) == 0.0:
        return False
    return falls[True] / promises[True] < _LATE * falls[False] / promises[False]


def _signs(context: PaceContext) -> tuple[float, float]:
    """Return how many entries of h are not zero, and the sample's signature, as agreed by all processes."""
    gradient = context.path.gradient
    count = sum((h.count_nonzero() for h in gradient.values), start=0)
    entries, sample = on_host(count, signature(context.closures, gradient.tensors))
    return entries, sample


def pace_of(option: Any, certified: bool) -> Pace:
    """Return the role that the option ``pace`` names, or the user's own.

    Args:
        option: The option.
        certified: Whether every step is to be one that a search has certified.
    """
    if isinstance(option, str):
        return EveryStep() if option == "every" or certified else AsLengthsAgree()
    role: Pace = option
    return role
