"""The input of a policy at one step, and the protocol of all policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from .armijo import LARGEST_RATIO
from .record import Record
from .scalars import Scalar

__all__ = ["Certificate", "Context", "Policy", "Trial"]


class Trial(Protocol):
    """The searched function: step -> value of the objective there."""

    def __call__(self, step_size: float, /) -> Scalar:
        """Return the value after a step of that size."""
        ...


Certificate = Callable[[float], bool]
"""A further test of a step whose trial has passed."""


class Accumulated(Protocol):
    """A state that coupled variables share."""

    @property
    def squares(self) -> Scalar:
        """The accumulated squared norms."""
        ...


class Context(NamedTuple):
    """The sample of one step, and the limits of the step. Each rule reads the attributes of its formula.

    Attributes:
        loss: f_i(x_k), the sampled loss.
        slope: <g, d>, which is the squared norm for plain gradients.
        trial: step -> f_i(x_k - step d), on the same sample. A search needs it, and rejects values that are not finite.
            A Polyak rule only uses it to find a first bound.
        lower_bound: Overrides the option for this sample.
        shared: States (after this iteration's step) of the variables that this one is coupled to.
        bound: Overrides the option `bound` (or `start`) for this step.
        scale: Factor of an estimated bound or first trial.
        cap: Largest trial of this step; it overrides the option `max_step` of a search. For a rule under a bound, the
            largest first bound that is estimated at this step.
        rounding: Relative rounding unit of the loss, for a search. If None, that of the dtype of the loss.
        certify: A further test of a search. It is called with a step whose trial has passed; False rejects the step.
        raw: The raw step of an `Envelope`. If None, Polyak's ratio. NaN counts as non-finite.
        most_ratio: Largest ratio |f| / <g, d> that gives a scale. Above it, the slope is a rounding error.
        onward: <g_k, x_{k-1} - x_k>, the decrease of f_k along the last step, to first order. None if it is not known.
            `GuardedSLS` reads it.
    """

    loss: Scalar
    slope: Scalar
    trial: Trial | None = None
    lower_bound: Scalar | None = None
    shared: Sequence[Accumulated] | None = None
    bound: Scalar | None = None
    scale: Scalar = 1.0
    cap: float | None = None
    rounding: float | None = None
    certify: Certificate | None = None
    raw: Scalar | None = None
    most_ratio: float = LARGEST_RATIO
    onward: float | None = None


S = TypeVar("S")


class Policy(Protocol[S]):
    """A step-size rule: frozen options, a separate state, and two pure functions between them.

    To write a rule, derive from this class and define `init` and `propose`.
    """

    def init(self) -> S:
        """Return the state before the first step."""
        ...

    def propose(self, state: S, context: Context) -> tuple[Record, S]:
        """Return the record of one step, and the state after it."""
        ...

    def step(
        self,
        state: S,
        *,
        loss: Scalar,
        slope: Scalar,
        trial: Trial | None = None,
        lower_bound: Scalar | None = None,
        shared: Sequence[Accumulated] | None = None,
        bound: Scalar | None = None,
        scale: Scalar = 1.0,
        cap: float | None = None,
        rounding: float | None = None,
        certify: Certificate | None = None,
        raw: Scalar | None = None,
        most_ratio: float = LARGEST_RATIO,
        onward: float | None = None,
    ) -> tuple[Record, S]:
        """Return the record of one step, and the state after it: `propose` with the `Context` as keywords."""
        context = Context(
            loss, slope, trial, lower_bound, shared, bound, scale, cap, rounding, certify, raw, most_ratio, onward
        )
        return self.propose(state, context)
