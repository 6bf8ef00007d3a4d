"""The Diagnosis role: what limits this run?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner
from ..hypergradient.solution import SolverStatus
from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from .context import Taken
from .roles import Diagnosis

__all__ = ["Diagnoses", "SlopeDiagnosis", "SolveDiagnosis", "StallDiagnosis", "motion"]

_NOT_DEFINITE = (
    "The lower Hessian is not positive definite on these samples: leave solver= out, here and in implicit(), for "
    "Lanczos, which holds there"
)
_REMEDIES = {
    SolverStatus.flat: "y does not answer to x: check the lower loss, or leave lower= out if f needs no answer of y",
}


@final
class Diagnoses:
    """Several diagnoses, one after the other; the entries of their states have different names.

    Args:
        parts: The diagnoses.
    """

    def __init__(self, parts: Sequence[Diagnosis]) -> None:
        self.parts = tuple(parts)

    def init(self) -> RoleState:
        """Return the entries of all."""
        return self._together([part.init() for part in self.parts])

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the messages of all."""
        return [text for part in self.parts for text in part.propose(taken, state)]

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return the new entries of all."""
        return self._together([part.commit(taken, messages, state) for part in self.parts])

    @staticmethod
    def _together(states: Sequence[RoleState]) -> RoleState:
        return RoleState({name: value for state in states for name, value in state.shared.items()})


@final
class SolveDiagnosis:
    """Reports once a solver that is no inverse here: solves that `SolverStatus.ended_by_curvature`.

    It does when there were 10 more such steps than others, for solvers that measure their error. `Lanczos` holds
    there, so only the absence of curvature is reported; `SearchingOptimizer.hessian` has the details. The
    state has that difference, "unsolved", in 0 to 10; at 10 it stays.
    """

    _STEPS = 10

    def init(self) -> RoleState:
        """Return a difference of 0."""
        return RoleState({"unsolved": 0})

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the message in the step that makes 10 of them."""
        hessian, count = taken.hessian, self._count(taken, state)
        if hessian is None or count != self._STEPS or count == state.shared["unsolved"]:
            return []
        return [
            f"in most steps, the solve of {taken.solver} for the response said: {hessian.status.sentence} (relative "
            f"residual now {hessian.residual:.3g}). {_REMEDIES.get(hessian.status, _NOT_DEFINITE)}"
        ]

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return the difference with this step in it."""
        return RoleState({"unsolved": self._count(taken, state)})

    def _count(self, taken: Taken, state: RoleState) -> int:
        count: int = state.shared["unsolved"]
        if taken.hessian is None or not taken.comparable or count == self._STEPS:
            return count
        return count + 1 if taken.hessian.status.ended_by_curvature else max(count - 1, 0)


@final
class SlopeDiagnosis:
    """Compares the slope of the searched function with what the hypergradient promised.

    A ratio s / <h, d> outside [1/2, 2] for 20 steps in a row is reported once. The state counts such steps, "far".
    """

    _STEPS = 20

    def init(self) -> RoleState:
        """Return a count of 0."""
        return RoleState({"far": 0})

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the message in the 20th such step."""
        if self._far(taken, state) != self._STEPS or not self._comparable(taken):
            return []
        return [
            f"for {self._STEPS} steps the searched function's slope was far from <hypergradient, direction> (ratio now "
            f"{taken.record.slope_ratio:.3g}): .grad and {taken.solver} disagree. Check the hypergradient with "
            "adaptive_bilevel.hypergradient.check, give BiSLS the solver that it uses, or solve further"
        ]

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return the count with this step in it."""
        return RoleState({"far": self._far(taken, state)})

    @staticmethod
    def _comparable(taken: Taken) -> bool:
        return taken.comparable and math.isfinite(taken.record.slope_ratio)

    def _far(self, taken: Taken, state: RoleState) -> int:
        far: int = state.shared["far"]
        if not self._comparable(taken):
            return far
        return far + 1 if not 0.5 <= taken.record.slope_ratio <= 2.0 else 0


@final
class StallDiagnosis:
    """Reports once that x stands still, although the hypergradient promises more than rounding.

    It does after 10 searched steps in a row that moved x by less than 1e-6 of its size, while a move by 1 % promises
    more than a thousandth of f (f not being a millionth of what it was once, where all that is rounding), and in which
    f did not fall by 1 % either. The state counts such steps, "still", and has f at the first of them, "since", the
    largest f, "largest", and whether it was said, "told".
    """

    _STEPS = 10
    _CHANGE, _GAIN, _FALL, _SMALL = 1e-6, 1e-3, 1e-2, 1e-6

    def init(self) -> RoleState:
        """Return a count of 0."""
        return RoleState({"still": 0, "since": 0.0, "largest": 0.0, "told": False})

    def propose(self, taken: Taken, state: RoleState) -> list[str]:
        """Return the message in the 10th such step."""
        if self._count(taken, state) != self._STEPS or state.shared["told"]:
            return []
        return [
            f"the upper variable stands still: in {self._STEPS} steps in a row it moved by less than {self._CHANGE:g} "
            f"of its size, although the hypergradient promises a decrease of {taken.gain:.3g} for 1 % of it. The last "
            f"step: {taken.record.describe()}. adaptive_bilevel.diagnose(optimizer) says what limits it"
        ]

    def commit(self, taken: Taken, messages: Sequence[str], state: RoleState) -> RoleState:
        """Return the count with this step in it."""
        count, f = self._count(taken, state), taken.loss
        size = max(state.shared["largest"], abs(f)) if math.isfinite(f) else state.shared["largest"]
        since, told = f if count == 1 else state.shared["since"], state.shared["told"] or count == self._STEPS
        return RoleState({"still": count, "since": since, "largest": size, "told": told})

    def _count(self, taken: Taken, state: RoleState) -> int:
        count: int = state.shared["still"]
        f, since = taken.loss, state.shared["since"]
        if not (taken.change < self._CHANGE and taken.gain > self._GAIN * abs(f)):
            return 0
        if abs(f) <= self._SMALL * state.shared["largest"]:
            return 0
        fell = count and f < since - self._FALL * abs(since)
        return 1 if fell else count + 1


def motion(path: SearchPath, step: float) -> tuple[float, float]:
    """Return how far a step along a path moves x, relative to its size, and what h promises of 1 % of that size.

    An x of zeros has the size of numbers of 1 %.
    """
    x = [p.detach() for p in path.gradient.tensors]
    square, length = on_host(inner(x, x), inner(path.along, path.along))
    if not (length > 0.0 and math.isfinite(length) and math.isfinite(square)):
        return math.nan, math.nan
    size = max(math.sqrt(square), 0.01 * math.sqrt(sum(p.numel() for p in x)))
    return step * math.sqrt(length) / size, 0.01 * size * path.promised / math.sqrt(length)
