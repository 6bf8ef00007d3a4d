"""Accumulated gradient norms: the tuning-free steps of TFBO (AdaGrad-norm, coupled between variables)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import validation
from .context import Context, Policy
from .record import Outcome, Record, closed_form
from .scalars import Scalar, isfinite, larger, where

__all__ = ["COUPLINGS", "GradientNorm", "GradientNormState"]

COUPLINGS = ("none", "max", "product")


class GradientNormState(NamedTuple):
    """State of `GradientNorm`.

    Attributes:
        count: The number of steps.
        squares: initial^2 + the sum of the squared norms.
    """

    count: Scalar = 0
    squares: Scalar = 0.0


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Policy[GradientNormState]):
    """gamma_k = 1 / a_k with a_k^2 = a_{k-1}^2 + ||g_k||^2, coupled as in S-TFBO (arXiv 2410.05140).

    Args:
        initial: a_{-1} > 0. It must not be 0, for the sake of a first gradient of 0.
        coupling: "none": 1/a (S-TFBO's y, all of D-TFBO); "max": 1/max{a, shared} (S-TFBO's v, which shares y's
            state); "product": 1/(a max{shared}) (S-TFBO's x, which shares y's and v's).

    All accumulators are updated before any is used: `shared` takes the states of the coupled variables after their step
    of this iteration. For the cold start of D-TFBO, call `init` again.

    Raises:
        OptionError: An option is out of range.

    >>> policy = GradientNorm(initial=1.0)
    >>> policy.step(policy.init(), loss=0.0, slope=16.0)[0].step_size ** -2
    17.0
    """

    initial: float = 1.0
    coupling: str = "none"

    def __post_init__(self) -> None:
        validation.positive("GradientNorm", "initial", self.initial, below_infinity=True)
        validation.choice("GradientNorm", "coupling", self.coupling, COUPLINGS)
        validation.make_plain(self)

    def init(self) -> GradientNormState:
        """Return the state before the first step."""
        return GradientNormState(0, self.initial**2)

    def propose(self, state: GradientNormState, context: Context) -> tuple[Record, GradientNormState]:
        """Return the record of one step, and the state after it. The loss must only be finite."""
        loss, slope = context.loss, context.slope
        # Neither may the sum overflow: it would be inf for ever.
        valid = isfinite(loss) & isfinite(state.squares + slope)
        moved = valid & (slope > 0)
        squares = state.squares + where(moved, slope, 0.0)
        others: Scalar = 0.0
        for other in context.shared or ():
            others = larger(other.squares, others)
        if self.coupling == "max":
            total = larger(squares, others)
        elif self.coupling == "product":
            total = squares * where(others > 0, others, 1.0)
        else:
            total = squares
        proposed = total**-0.5
        outcome = where(slope < 0, int(Outcome.no_descent), int(Outcome.accepted))
        outcome = where(slope == 0, int(Outcome.zero_gradient), outcome)
        outcome = where(valid, outcome, int(Outcome.non_finite))
        record = closed_form(where(moved, proposed, 0.0), proposed, float("inf"), outcome, slope)
        return record, GradientNormState(where(moved, state.count + 1, state.count), squares)
