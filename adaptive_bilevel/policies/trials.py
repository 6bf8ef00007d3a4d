"""What a search starts from, and what its trials come to."""

from __future__ import annotations

from typing import NamedTuple

from .record import Outcome
from .state import SearchState

__all__ = ["Again", "Found", "Point", "Trials"]


class Again(NamedTuple):
    """A rejected trial that was evaluated once more.

    Attributes:
        step: The trial.
        value: The loss there now.
        same: Whether that is the value of before; otherwise the closure changes, and the loss need not jump.
        passes: Whether the step is accepted.
    """

    step: float
    value: float
    same: bool
    passes: bool


class Found(NamedTuple):
    """A bound or first trial that a search finds by itself.

    Attributes:
        state: The state that holds it; 0 if this point does not show one.
        estimated: Whether it is an estimate, which later steps improve.
        trials: Trials made for it.
        outcome: Of the step, if there is none.
    """

    state: SearchState
    estimated: bool = False
    trials: int = 0
    outcome: Outcome = Outcome.zero_gradient


class Point(NamedTuple):
    """The numbers of a sample, on the host.

    Attributes:
        loss: f_i(x_k).
        slope: <g, d>.
        rounding: Relative rounding unit of the loss.
        spread: Standard deviation of the recent losses; 0: not known.
    """

    loss: float
    slope: float
    rounding: float
    spread: float = 0.0


class Trials(NamedTuple):
    """What backtracking has come to.

    Attributes:
        step: The last trial, or the one that was gone back to.
        outcome: How it ended.
        made: Number of trials.
        value: The loss at that step.
        jumped: Whether rejected trials have shown that the loss jumps, see `Search._jumps`.
        back: Whether it has gone back to a trial that was rejected.
    """

    step: float
    outcome: Outcome
    made: int
    value: float
    jumped: bool = False
    back: bool = False
