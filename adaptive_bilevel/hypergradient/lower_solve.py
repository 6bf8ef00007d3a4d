"""Solving the lower problem to rounding, for `check`: Newton's method with conjugate gradients, warm started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation.vectors import Vector, add, dot, negate, rounding
from .cg import CG
from .products import Sampled

__all__ = ["Resolved", "resolve"]


class Resolved(NamedTuple):
    """How a solve of the lower problem ended.

    Attributes:
        gradient_norm: ``||grad_y g||`` where it ended, NaN if g was not finite there.
        iterations: Number of Newton steps.
    """

    gradient_norm: float
    iterations: int


def resolve(
    sample_at: Callable[[], Sampled],
    value_at: Callable[[], float],
    lower: Sequence[Tensor],
    *,
    max_iterations: int,
) -> Resolved:
    """Move ``lower`` in place to a minimizer of the lower loss, as near as the dtype allows.

    Far away, Newton's direction with an Armijo search on the loss. Once the predicted decrease is below the rounding
    of the loss, full steps as long as the gradient halves: gradients keep their digits where losses have lost them.

    Args:
        sample_at: Returns g at the present point, with products there.
        value_at: Returns g at the present point as a number.
        lower: The tensors of y.
        max_iterations: Most Newton steps.
    """
    unit = rounding(lower)
    solver = CG(max_iterations=max(20, min(200, 2 * sum(tensor.numel() for tensor in lower))), tolerance=1e-6)
    polishing, before, norm, iteration = False, _copy(lower), math.inf, 0
    for iteration in range(max_iterations + 1):
        loss, curvature, _ = sample_at()
        value, previous, norm = float(loss), norm, math.sqrt(dot(curvature.gradient, curvature.gradient))
        if not math.isfinite(norm) or not math.isfinite(value):
            return Resolved(math.nan, iteration)
        if polishing and norm > 0.5 * previous:
            if norm > previous:
                _put(lower, before)
            return Resolved(min(norm, previous), iteration)
        if norm == 0.0 or iteration == max_iterations:
            break
        before = _copy(lower)
        descent = negate(curvature.gradient)
        direction = solver.solve(curvature.hvp, descent).tensors
        slope = dot(curvature.gradient, direction)
        if not slope < 0.0:  # negative curvature at once: the gradient is all there is
            direction, slope = descent, -(norm**2)
        polishing = -slope <= 64 * unit * abs(value)
        step = 1.0
        _put(lower, add(before, direction, step))
        while not polishing and not value_at() <= value + 1e-4 * step * slope + unit * abs(value):
            step *= 0.5
            if step < 1e-12:
                _put(lower, before)
                return Resolved(norm, iteration)
            _put(lower, add(before, direction, step))
    return Resolved(norm, iteration)


def _copy(tensors: Sequence[Tensor]) -> Vector:
    return tuple(tensor.detach().clone() for tensor in tensors)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
