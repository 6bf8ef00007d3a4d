"""What the trials of searches show of a closure: its value changes at the same point, or does not follow parameters.

A search compares values of one function. Two kinds of closures have none. One changes from call to call (it draws its
batch from an iterator, or has random numbers of its own): trials are rejected by chance. One returns a loss that was
computed before the step (at the end of an unrolled loop): all trials have the same value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, final

from torch import Tensor

from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner, rounding
from ..policies import Outcome, Record

__all__ = ["ClosureChecks", "WatchedTrials"]

S = TypeVar("S")

_REJECTED = 5
"""So many trials of a search that starts from an accepted step are a reason to look at the closure."""

_LOOKS = (1, 10, 100, 1000, 10000)
"""The searches with such a reason after which the closure is looked at, by their number."""

_UNITS = 64.0
"""So many rounding units of the loss are no accident."""

_MOVES = 1e3
"""A trial is long if it moves the parameters by so many of their rounding units, too."""

_EQUAL = 3
"""So many long trials of one value, to the bit, are no accident (one is, where a step leads across a valley)."""

_CHANGES = (
    "the closure returned {first!r} and then {second!r} at the same point, so trials are compared with another loss "
    "than theirs, and the search rejects by chance. It may draw its batch itself (an iterator), or random numbers from "
    "NumPy, Python or a generator of its own: draw the batch outside of the closure, and random numbers from torch's "
    "default generator, which a trial repeats"
)
_STAYS = (
    "the loss is {loss!r}, the same to the bit in {trials} trials, although the gradient promises a decrease of "
    "{promise:.3g} there: what the closure returns does not depend on the parameters as they are in a trial. It may "
    "have been computed before the step (at the end of an unrolled loop), or from copies: compute it inside of the "
    "closure, from the parameters themselves, the loop included. Nothing moved"
)


@final
class ClosureChecks:
    """The checks of the closure of one optimizer, over its steps. Each message is given once.

    Attributes:
        changes: Whether the closure was found to change at the same point.
        stays: Whether the last search found a loss that does not follow the parameters.
    """

    def __init__(self) -> None:
        self.changes, self.stays = False, False
        self._reasons = 0
        self._said: set[str] = set()
        self._messages: list[str] = []

    def watch(
        self,
        trial: Callable[[float], float],
        loss: float,
        slope: float,
        rounding: float,
        tensors: Sequence[Tensor],
        along: Sequence[Tensor],
    ) -> WatchedTrials:
        """Return the trial function of one search, watched.

        Args:
            trial: Returns the value of a step.
            loss: The value that trials are compared with.
            slope: What the gradient promises of a step of 1.
            rounding: Relative rounding unit of the loss.
            tensors: The parameters; none: no trial is long enough for the second check.
            along: Along what they move.
        """
        return WatchedTrials(self, trial, loss, slope, rounding, lambda: _visible(tensors, along))

    def due(self) -> bool:
        """Take note of a search with a reason to look at the closure, and return whether to look now."""
        if self.changes:
            return False
        self._reasons += 1
        return self._reasons in _LOOKS

    def say(self, kind: str, message: str) -> None:
        """Have something said at the end of the step, once per kind."""
        if kind not in self._said:
            self._said.add(kind)
            self._messages.append(message)

    def take(self) -> list[str]:
        """Return the warnings to give now."""
        messages, self._messages = self._messages, []
        return messages


@final
class WatchedTrials:
    """The trials of one search; see `ClosureChecks.watch`.

    Attributes:
        counted: Trials evaluated.
        looked: Whether the closure was evaluated where the step began, too, so that the parameters are there.
    """

    def __init__(
        self,
        closure_checks: ClosureChecks,
        trial: Callable[[float], float],
        loss: float,
        slope: float,
        rounding: float,
        visible: Callable[[], float],
    ) -> None:
        self._closure_checks, self._trial = closure_checks, trial
        self._find_visible, self._visible = visible, math.nan
        self._loss, self._slope, self._rounding = loss, slope, _UNITS * rounding
        self._equal, self._other, self._promise = 0, False, 0.0
        self.counted, self.looked = 0, False

    def __call__(self, step: float) -> float:
        """Return the value of a step; infinity, unevaluated, where it is known that it would say nothing."""
        if self._closure_checks.stays and self._stays:
            return math.inf
        self.counted += 1
        value = self._trial(step)
        if value != self._loss:
            self._other = True
        elif self._is_long(step):
            self._equal += 1
            self._promise = max(self._promise, step * self._slope)
        return value

    def _is_long(self, step: float) -> bool:
        """Return whether a step promises more of the loss, and of the parameters, than rounding can hide."""
        if self._loss == 0.0 or not step * self._slope > self._rounding * abs(self._loss):
            return False
        if math.isnan(self._visible):
            self._visible = self._find_visible()
        return step > self._visible

    @property
    def _stays(self) -> bool:
        return self._equal >= _EQUAL and not self._other

    def conclude(
        self, record: Record, after: S, before: S, look: Callable[[], float], *, compared: float | None = None
    ) -> tuple[Record, S]:
        """Return record and state of the search: those of a failed one where the loss does not follow the parameters.

        Args:
            record: The record that the policy returned.
            after: The state that it returned.
            before: Its state before.
            look: Puts the parameters where the step began, and evaluates the closure.
            compared: The loss there, where trials were compared with another value.
        """
        checks, trials = self._closure_checks, self.counted
        checks.stays = self._stays and (not record.moved or float(record.value) == self._loss)
        if checks.stays:
            checks.say("stays", _STAYS.format(loss=self._loss, trials=trials, promise=self._promise))
            failed = record._replace(step_size=0.0, outcome=Outcome.search_failed, trials=trials, value=self._loss)
            return failed, before
        failed_now = record.outcome == Outcome.search_failed
        resumed = float(getattr(before, "previous", 0.0)) > 0.0
        if (failed_now or (resumed and trials >= _REJECTED)) and checks.due():
            first, self.looked = self._loss if compared is None else compared, True
            second = look()
            if self._apart(first, second) and self._apart(second, look()):
                checks.changes = True
                checks.say("changes", _CHANGES.format(first=first, second=second))
        return record, after

    def _apart(self, one: float, other: float) -> bool:
        """Return whether two values are none of one function, but of rounding."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return False
        return abs(one - other) > self._rounding * max(abs(one), abs(other))


def _visible(tensors: Sequence[Tensor], along: Sequence[Tensor]) -> float:
    """Return the step above which parameters move by more than rounding; inf without any."""
    if not tensors:
        return math.inf
    at = [p.detach() for p in tensors]
    square, size = on_host(inner(along, along), inner(at, at))
    return _MOVES * rounding(at) * math.sqrt(size / square) if square > 0.0 else math.inf
