"""Records of the iterations of a method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..evaluation.counts import Counts, Evaluations
from ..hypergradient.trees import Tree
from ..policies import Record

__all__ = ["IterationRecord", "Losses", "Steps", "copied", "spent"]


class Losses(NamedTuple):
    """The losses on the samples of an iteration, before its steps. NaN for a loss that was not evaluated.

    Attributes:
        upper: f at the point of the hypergradient.
        lower: The function of y's field (mostly g) at the point of the last lower gradient.
    """

    upper: float
    lower: float


class Steps(NamedTuple):
    """The step sizes; 0 if nothing moved.

    Attributes:
        upper: Step of x.
        lower: Last step of y.
    """

    upper: float
    lower: float


@dataclass(frozen=True)
class IterationRecord:
    """The record of an iteration.

    Attributes:
        iteration: k, from 0.
        x: x after it, arranged as it was given (parameters of a module by name).
        y: y after it, likewise.
        losses: The losses on its samples.
        steps: Its step sizes.
        evaluations: Its oracle calls.
        total: All oracle calls since the start.
        hypergradient: The estimate of grad F, arranged like x.
        auxiliary: v and z after it, if the method has them, arranged like y.
        multiplier: lambda of the step of x; 0 if there is none.
        directions: Last direction of each variable, arranged like the variable.
        records: The records of all steps, by variable.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> start, steps = (torch.tensor([4.0]), torch.tensor([0.0])), {"upper_step": 0.25, "lower_step": 0.5}
    >>> *_, last = methods.run("ba", problem, *start, iterations=3, **steps)
    >>> last.iteration, last.steps, last.x
    (2, Steps(upper=0.25, lower=0.0), tensor([1.3750]))
    >>> last.evaluations.upper
    Counts(values=0, gradients=1, hvps=0, jvps=0)
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
