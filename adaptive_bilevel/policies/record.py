"""The output of a policy: an outcome, and a record of its numbers."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from .scalars import Scalar, like

__all__ = ["Outcome", "Record", "closed_form"]


class Outcome(IntEnum):
    """The reason for a step size. `sentence` has it in words.

    >>> Outcome.search_failed.sentence
    'no trial step gave sufficient decrease: nothing moved, the last good step is kept'
    """

    accepted = 0
    at_bound = 1
    at_floor = 2
    search_failed = 3
    no_descent = 4
    zero_gradient = 5
    non_finite = 6
    below_lower_bound = 7
    at_lower_bound = 8
    kept = 9
    undone = 10
    returned = 11

    @property
    def sentence(self) -> str:
        """The outcome as a sentence."""
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.accepted: "the proposed step was taken",
    Outcome.at_bound: "the bound was reached: the step is the bound",
    Outcome.at_floor: "the proposed step was shorter than the floor: the floor was taken",
    Outcome.search_failed: "no trial step gave sufficient decrease: nothing moved, the last good step is kept",
    Outcome.no_descent: "the slope is negative, so the direction does not descend: nothing moved",
    Outcome.zero_gradient: "the gradient is zero: nothing moved",
    Outcome.non_finite: "the loss, the slope or the proposed step is not finite: nothing moved",
    Outcome.below_lower_bound: "the loss is below lower_bound, which therefore is no lower bound here",
    Outcome.at_lower_bound: "the loss is at lower_bound, so there is nothing to gain: nothing moved",
    Outcome.kept: "no search was due: the length of an earlier search was kept",
    Outcome.undone: "the loss after the last step, whose length was kept, is too high: that step was undone",
    Outcome.returned: "the loss left all of its recent values: the run went back to an earlier point",
}


class Record(NamedTuple):
    """The record of one step.

    Attributes:
        step_size: The step; 0 if nothing moves.
        proposed: The raw value before the bounds, or the last candidate of a search.
        bound: The cap of the step; inf if there is none.
        outcome: An `Outcome`, as an integer that can be traced.
        trials: Number of trials.
        value: The objective at the last trial; NaN if there was none.
        slope: The slope <g, d>.
        slope_ratio: For a step of `BiSLS`, the slope of the searched function over <hypergradient, direction>. If it
            stays far from 1, the hypergradient and the solver of the response disagree. NaN for other steps.
    """

    step_size: Scalar
    proposed: Scalar
    bound: Scalar
    outcome: Scalar
    trials: int = 0
    value: Scalar = float("nan")
    slope: Scalar = float("nan")
    slope_ratio: Scalar = float("nan")

    @property
    def moved(self) -> bool:
        """Whether the step moves anything. On an accelerator, this waits for the device."""
        return float(self.step_size) > 0.0

    def describe(self) -> str:
        """Return a sentence on the step.

        >>> Record(0.25, 0.25, 1.0, Outcome.accepted, 2, 0.5).describe()
        'step 0.25 (proposed 0.25, bound 1, 2 trials): the proposed step was taken'
        """
        trials = "" if not self.trials else f", {self.trials} trial" + "s" * (self.trials != 1)
        return (
            f"step {float(self.step_size):.4g} (proposed {float(self.proposed):.4g}, "
            f"bound {float(self.bound):.4g}{trials}): {Outcome(int(self.outcome)).sentence}"
        )


def closed_form(step_size: Scalar, proposed: Scalar, bound: Scalar, outcome: Scalar, slope: Scalar) -> Record:
    """Return the record of a step without trials, all of it of the slope's kind: torch's vmap returns nothing else."""
    none = like(float("nan"), slope)
    return Record(
        step_size, like(proposed, slope), like(bound, slope), outcome, like(0, outcome), none, slope, slope_ratio=none
    )
