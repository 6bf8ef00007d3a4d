"""One variable of a row as a run steps it: its rules, their states, and what it did in this iteration."""

from __future__ import annotations

from typing import TypeAlias

from ..evaluation.vectors import Vector, dot
from ..hypergradient.estimate import Point
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..policies import Record, State
from .directions import Directed, DirectionState, Sampled
from .fields import Gradient
from .row import Row

__all__ = ["Stepper", "Steppers"]


class Stepper:
    """A variable: what it descends on, its direction and its step rule.

    Args:
        row: The row.
        name: The variable: "x", "y", "v" or "z".

    Attributes:
        name: The variable.
        policy: Its step rule.
        rule: The rule's state.
        past: Its direction's state.
        seen: Its last gradient in this iteration; None: not taken yet.
        taken: The records of its steps in this iteration.
        stepped: What it was last stepped along in this iteration; None: it was not.
    """

    def __init__(self, row: Row, name: str) -> None:
        self.name, self.policy = name, row.step_of(name)
        self._field, self._direction = row.field_of(name), row.direction_of(name)
        self.rule: State = self.policy.init()
        self.past: DirectionState = {}
        self.begin()

    def begin(self) -> None:
        """Begin an iteration."""
        self.seen: Gradient | None = None
        self.taken: list[Record] = []
        self.stepped: Vector | None = None

    def restart(self) -> None:
        """Let the step rule begin anew."""
        self.rule = self.policy.init()

    def look(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Take the gradient at a point, keep it as the last one, and return it."""
        self.seen = self.gradient(oracle, point, sample)
        return self.seen

    def gradient(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the gradient at a point."""
        return self._field(oracle, point, sample)

    def directed(
        self, oracle: Oracle, gradient: Gradient, point: Point, sample: Sample, full: Sample | None, iteration: int
    ) -> Directed:
        """Return the direction at a gradient.

        Args:
            oracle: Takes further gradients.
            gradient: The gradient.
            point: Where it was taken.
            sample: On which sample.
            full: The sample of all data; None if it is not known.
            iteration: k.
        """

        def again(there: Point, on: Sample) -> Vector:
            return self.gradient(oracle, there, on).total

        return self._direction(self.past, Sampled(gradient, point, sample, again, full, iteration))

    def within(self, tolerance: float) -> bool:
        """Whether the squared norm of the last gradient is at most the tolerance."""
        assert self.seen is not None
        return dot(self.seen.total, self.seen.total) <= tolerance

    @property
    def last_step(self) -> float:
        """The last step size in this iteration, 0 if it took none."""
        return float(self.taken[-1].step_size) if self.taken else 0.0


Steppers: TypeAlias = dict[str, Stepper]
