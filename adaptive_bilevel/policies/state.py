"""What the rules under a bound and the searches keep from step to step: numbers, or 0-dim arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

from .scalars import Scalar

__all__ = ["BoundState", "DecSPSState", "SearchState", "State"]

State = Any
"""A state of some policy: a NamedTuple of numbers, or 0-dim arrays; `count`, and `found` where a bound can be found."""


class BoundState(NamedTuple):
    """State of a rule under a decaying bound.

    Attributes:
        count: Number of steps that moved; the k of the schedules.
        found: The initial bound that the rule found by itself; 0 before the first step, and when a bound was given.
        seen: Number of samples behind the estimates that follow; see `adaptive_bilevel.policies.distance`.
        mean_loss: Decaying mean of the losses f_j.
        loss_variance: Decaying variance of the losses.
        mean_slope: Decaying mean of the slopes n_j.
        distance: Lower estimate of ||x_0 - x*||^2.
        weighted_loss: sum_j gamma_j f_j.
        path: sum_j gamma_j.
        squares: sum_j gamma_j^2 n_j.
    """

    count: Scalar = 0
    found: Scalar = 0.0
    seen: Scalar = 0
    mean_loss: Scalar = 0.0
    loss_variance: Scalar = 0.0
    mean_slope: Scalar = 0.0
    distance: Scalar = 0.0
    weighted_loss: Scalar = 0.0
    path: Scalar = 0.0
    squares: Scalar = 0.0


class DecSPSState(NamedTuple):
    """State of `DecSPS`.

    Attributes:
        count: As in `BoundState`.
        found: As in `BoundState`.
        product: c_{k-1} gamma_{k-1}; 0 before the first step.
    """

    count: Scalar = 0
    found: Scalar = 0.0
    product: Scalar = 0.0


class SearchState(NamedTuple):
    """State of a search.

    Attributes:
        count: Number of steps that moved; the k of the schedules.
        found: The initial bound or first trial that the search found by itself; 0 before, and when one was given.
        previous: The last accepted step; 0 before there was one.
        seen: This and what follows are the estimates of `BoundState`, used by `SLSB` and `AutoSLS` without a bound.
        mean_loss: See `BoundState`.
        loss_variance: See `BoundState`.
        mean_slope: See `BoundState`.
        distance: See `BoundState`.
        weighted_loss: See `BoundState`.
        path: See `BoundState`.
        squares: See `BoundState`.
        expected: f_{k-1}(x_k), the loss of the last sample after the step on it; this and what follows is used by
            `AutoSLS`.
        last_decrease: f_{k-1}(x_{k-1}) - f_{k-1}(x_k); 0 where there is nothing to compare with.
        longest: The longest step that was accepted while samples agreed.
        differing: The part of the decreases that the next samples have not confirmed.
        decreases: The sum of the decreases that were compared.
        loop_decrease: The sum of the decreases since the upper variable last moved.
        loop_ends: Whether it has moved since the last step, 0 or 1.
        nested: Whether it has moved at all, 0 or 1: the steps are those of a lower level.
        loops_differing: As `differing`, of whole loops.
        loops_decreases: As `decreases`, of whole loops.
        last_loss: f_{k-1}, the loss before the last step.
        last_gain: gamma_{k-1} n_{k-1} of that step; 0 before there was one.
        largest_gain: The largest gamma_j n_j so far; of `AutoSLS`, while samples agreed.
        highest: The largest f_j while samples agreed, or among the first 8; of `AutoSLS`.
        lowest: The least of these.
        ranged: The number of these.
        gains: The sum of the gamma_j n_j.
        onward: The sum of the <g_{j+1}, x_j - x_{j+1}>; this and the next are used by `GuardedSLS`.
        onward_squares: The sum of their squares.
        margin: M, by how much the losses fell more than the steps promised; see `adaptive_bilevel.policies.margin`.
    """

    count: int = 0  # type: ignore[assignment]
    found: float = 0.0
    previous: float = 0.0
    seen: int = 0
    mean_loss: float = 0.0
    loss_variance: float = 0.0
    mean_slope: float = 0.0
    distance: float = 0.0
    weighted_loss: float = 0.0
    path: float = 0.0
    squares: float = 0.0
    expected: float = 0.0
    last_decrease: float = 0.0
    longest: float = 0.0
    differing: float = 0.0
    decreases: float = 0.0
    loop_decrease: float = 0.0
    loop_ends: int = 0
    nested: int = 0
    loops_differing: float = 0.0
    loops_decreases: float = 0.0
    last_loss: float = 0.0
    last_gain: float = 0.0
    largest_gain: float = 0.0
    highest: float = 0.0
    lowest: float = 0.0
    ranged: int = 0
    gains: float = 0.0
    onward: float = 0.0
    onward_squares: float = 0.0
    margin: float = 0.0
