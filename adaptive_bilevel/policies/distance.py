"""The bound that needs no number: distance to the solution over gradient norm, both estimated from scalars.

Theorem 1 of Fan et al. (2023) bounds the error of a rule under gamma_b,0 / sqrt(k+1) by a multiple of
||x_0 - x*||^2 / gamma_b,0 + gamma_b,0 G (1 + log K), G the mean squared gradient norm: up to the logarithm,
gamma_b,0 = D / sqrt(G) is best. Neither is known, but losses bound D. Expanding ||x_{k+1} - x*||^2 and using convexity,
in expectation

    D^2  >=  sum_j 2 gamma_j (f_j - F*) - sum_j gamma_j^2 n_j,        n_j = ||g_j||^2 (or the slope <g, d>)

and any recent mean loss F >= F* in the place of F* keeps a lower bound of D^2. D^2 starts with the longest
step that does not raise the first sample's loss (for a quadratic, twice the distance to its minimizer along the
gradient), or with Polyak's distance (f_0 - l)^2 / n_0 where that cannot be tried, and never decreases; two standard
errors of F keep noise out of it. G is a mean of the n_j. Both means
decay polynomially, so they forget the start at any time scale. No evaluation and no copy of x is needed.

Where F is not convex, this is a heuristic. ``examples/benchmarks/suite.py --task w8a a9a ...`` measures it:
suboptimality 0.7 to 1.4 times that of the best bound of a grid; 9 (SPSB) and 50 (SLSB) where x* is at infinity.
"""

from __future__ import annotations

from typing import TypeVar

from .scalars import Scalar, clock, larger, largest_quotient, like, root, where
from .state import BoundState, SearchState

__all__ = ["estimate", "take"]

LOSS_MEMORY = 3.0
SLOPE_MEMORY = 15.0
"""Shape of the decaying means (an average over about the last k/(memory+1) of k steps), not a scale."""

STANDARD_ERRORS = 2.0

E = TypeVar("E", BoundState, SearchState)


def estimate(state: E, loss: Scalar, slope: Scalar, first: Scalar) -> E:
    """Return the state with this sample in it; its `found` is gamma_b,0 = D / sqrt(G) as estimated before the step.

    Args:
        state: The state, with the estimates of `adaptive_bilevel.policies.BoundState`.
        loss: f_k.
        slope: n_k, positive (what is returned for another slope is to be thrown away).
        first: The bound of the first step, whose length gives the first distance; not used later.
    """
    k = clock(state.seen, loss)
    weight = (LOSS_MEMORY + 1.0) / (k + LOSS_MEMORY + 1.0)
    ahead = loss - state.mean_loss
    variance = where(k > 0, (1.0 - weight) * (state.loss_variance + weight * ahead * ahead), like(0.0, loss))
    mean_loss = state.mean_loss + weight * ahead
    mean_slope = state.mean_slope + (SLOPE_MEMORY + 1.0) / (k + SLOPE_MEMORY + 1.0) * (slope - state.mean_slope)
    spread = (LOSS_MEMORY + 1.0) ** 2 / (2.0 * LOSS_MEMORY + 1.0) / (k + 1.0)
    error = root(variance * spread)
    progress = 2.0 * (state.weighted_loss - state.path * (mean_loss + STANDARD_ERRORS * error)) - state.squares
    distance = where(k > 0, larger(progress, state.distance), first * slope * first)
    divisible = mean_slope > distance * 2.0**-100
    found = root(where(divisible, distance / where(divisible, mean_slope, 1.0), state.found * state.found))
    # Both are squares: where their quotient would leave the range of a dtype, that of their roots need not.
    length, size = root(distance), root(mean_slope)
    far = (divisible ^ True) & (size > length / largest_quotient(loss))
    found = where(far, length / where(far, size, 1.0), found)
    return state._replace(
        seen=state.seen + 1,
        found=found,
        mean_loss=mean_loss,
        loss_variance=variance,
        mean_slope=mean_slope,
        distance=distance,
    )


def take(state: E, loss: Scalar, slope: Scalar, step: Scalar) -> E:
    """Return the state after the step was taken; one of length 0 changes nothing, whatever its loss was."""
    loss, slope = (where(step > 0, scalar, like(0.0, scalar)) for scalar in (loss, slope))
    return state._replace(
        weighted_loss=state.weighted_loss + step * loss,
        path=state.path + step,
        squares=state.squares + step * step * slope,
    )
