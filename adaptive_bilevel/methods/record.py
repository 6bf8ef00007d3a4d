"""What one iteration of a method did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..evaluation.counts import Counts, Evaluations
from ..hypergradient.trees import Tree
from ..policies import Record

__all__ = ["IterationRecord", "Losses", "Steps", "copied", "spent"]


class Losses(NamedTuple):
    """The losses as the iteration saw them, on its samples, before its steps; NaN if it did not evaluate one.

    Attributes:
        upper: f where the hypergradient was estimated.
        lower: g (or what else y descends on) where the last lower gradient was taken.
    """

    upper: float
    lower: float


class Steps(NamedTuple):
    """The step sizes; 0 where nothing moved.

    Attributes:
        upper: Of x.
        lower: Of y, the last one.
    """

    upper: float
    lower: float


@dataclass(frozen=True)
class IterationRecord:
    """What one iteration did.

    Attributes:
        iteration: k, from 0.
        x: x after it, arranged as it was given (parameters of a module by name).
        y: y after it, likewise.
        losses: The losses that it saw.
        steps: Its step sizes.
        evaluations: The oracle calls that it made.
        total: All oracle calls since the start.
        hypergradient: The estimate of grad F that x was stepped along, arranged like x.
        auxiliary: v and z after it, where the method has them, arranged like y.
        multiplier: lambda that x was stepped with; 0 where there is none.
        directions: What each variable was last stepped along, arranged like it.
        records: The records of all steps, by variable.
    """

    iteration: int
    x: Tree
    y: Tree
    losses: Losses
    steps: Steps
    evaluations: Evaluations
    total: Evaluations
    hypergradient: Tree
    auxiliary: dict[str, Tree]
    multiplier: float
    directions: dict[str, Tree]
    records: dict[str, tuple[Record, ...]]

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"iteration {self.iteration}: f {self.losses.upper:.6g} (step {self.steps.upper:.3g}), "
            f"g {self.losses.lower:.6g} (step {self.steps.lower:.3g}), cost {self.total_cost:.6g} gradients"
        )

    @property
    def total_cost(self) -> float:
        """Cost of all oracle calls so far, in gradients (`Counts.cost`)."""
        return self.total.upper.cost + self.total.lower.cost


def copied(counts: Evaluations) -> Evaluations:
    """Return the counts as they are now."""
    return Evaluations(replace(counts.upper), replace(counts.lower))


def spent(now: Evaluations, before: Evaluations) -> Evaluations:
    """Return the calls between two counts."""

    def difference(left: Counts, right: Counts) -> Counts:
        return Counts(
            left.values - right.values,
            left.gradients - right.gradients,
            left.hvps - right.hvps,
            left.jvps - right.jvps,
        )

    return Evaluations(difference(now.upper, before.upper), difference(now.lower, before.lower))
