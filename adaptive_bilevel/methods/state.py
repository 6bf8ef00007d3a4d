"""What a run keeps from one iteration to the next, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..errors import OptionError
from ..evaluation.counts import Evaluations
from ..evaluation.vectors import Vector
from ..hypergradient.estimate import Point
from .stepper import Steppers

__all__ = ["PlainData", "RunState", "load_counts", "saved_counts"]

PlainData: TypeAlias = dict[str, Any]  # tensors, numbers and strings, in dicts, lists and tuples


@dataclass
class RunState:
    """What a run keeps from one iteration to the next, beside the states of its batches and of its upper search.

    Attributes:
        point: Where the variables are.
        first: y at the start of the run.
        steppers: The variables, in the order of their steps.
        generator: Of all random numbers.
        lower_step: The last step size of y.
        count: k, the number of iterations so far.
    """

    point: Point
    first: Vector
    steppers: Steppers
    generator: torch.Generator
    lower_step: float = 0.0
    count: int = 0

    def saved(self) -> PlainData:
        """Return it as plain data."""
        return {
            "count": self.count,
            "point": self.point._asdict(),
            "first": self.first,
            "rules": {name: stepper.rule._asdict() for name, stepper in self.steppers.items()},
            "directions": {name: stepper.past for name, stepper in self.steppers.items()},
            "lower_step": self.lower_step,
            "generator": self.generator.get_state(),
        }

    def load(self, saved: PlainData) -> None:
        """Go back, or on, to what was saved.

        Raises:
            OptionError: It is that of variables of other shapes.
        """
        point = Point(**saved["point"])
        _refuse_shapes("x", point.x, self.point.x)
        _refuse_shapes("y", point.y, self.point.y)
        self.point, self.first = point, saved["first"]
        self.count, self.lower_step = saved["count"], saved["lower_step"]
        for name, stepper in self.steppers.items():
            stepper.rule = type(stepper.rule)(**saved["rules"][name])
            stepper.past = saved["directions"][name]
        self.generator.set_state(saved["generator"])


def _refuse_shapes(name: str, saved: Vector, present: Vector) -> None:
    was, now = ([tuple(t.shape) for t in tensors] for tensors in (saved, present))
    if was != now:
        raise OptionError(f"methods.run(resume=...): {name} was saved with shapes {was}, and now has {now}")


def saved_counts(evaluations: Evaluations) -> PlainData:
    """Return counts as plain data."""
    return {"upper": dict(vars(evaluations.upper)), "lower": dict(vars(evaluations.lower))}


def load_counts(evaluations: Evaluations, saved: PlainData) -> None:
    """Set counts to what was saved."""
    vars(evaluations.upper).update(saved["upper"])
    vars(evaluations.lower).update(saved["lower"])
