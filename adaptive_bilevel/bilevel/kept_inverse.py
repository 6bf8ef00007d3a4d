"""The inverse that a response keeps for the steps that follow.

Where the hypergradient has the same `Lanczos`, it leaves its inverse P for the response, which then costs one product.
Any other hypergradient (that of a virtual step, of a host, of `CG`) leaves none, and the response builds its own: k
products in each step, several times the price of the hypergradient itself if that is one of first order.

So P is used again,

    P = V phi(T) V^T + c (I - V V^T),    V and T of the step that built it, c of each step,

in 1, 2, 4, ... and at last k / 2 steps: x and y move most at first. A step then takes three products with H on average,
two for V and one to measure c, and one with C. The slope of the searched function, <f_x, d> - <f_y, P C^T d>, is still
that of the hypergradient f_x - C P f_y, since P is symmetric. On minibatches, V comes from another sample than f_y and
C^T d, so P does not depend on what a sample has by chance. ``docs/decisions/kept_inverse.md`` has what was measured.

If d does not descend along the tangent, the step follows f_x - C P f_y, which does, since P is positive definite.
Nothing is kept where the hypergradient leaves its inverse, with several lower problems of which one answers to another,
and where y is in parts (`fully_shard`).
"""

from __future__ import annotations

import math

from ..evaluation.parts import any_in_parts
from ..hypergradient.lanczos import Lanczos
from ..hypergradient.solution import LinearSolver
from ..hypergradient.spectral_inverse import SpectralInverse
from ..optim.state import RoleState
from .context import Point
from .inverse import Inverse

__all__ = ["init", "keep", "recall"]


def init() -> RoleState:
    """Return the state before the first step.

    It has "uses", the number of steps that have used the inverse, "serves", the number of those that may, and, once
    there is one, "inverse", what `SpectralInverse.saved` returns.
    """
    return RoleState({"uses": 0, "serves": 0})


def recall(state: RoleState, solver: LinearSolver, point: Point) -> SpectralInverse | None:
    """Return the inverse of an earlier step, or None if one is to be built.

    Args:
        state: See `init`.
        solver: P.
        point: Where the step begins.
    """
    saved, due = state.shared.get("inverse"), state.shared["uses"] >= state.shared["serves"]
    if due or not (saved and isinstance(solver, Lanczos) and saved["k"] == solver.k):
        return None
    return SpectralInverse.restored(point.lower, saved)


def keep(inverse: Inverse, state: RoleState) -> RoleState:
    """Return the state with what a step has built or used.

    Args:
        inverse: P of the step.
        state: See `init`.
    """
    if inverse.again:
        return RoleState({"uses": state.shared["uses"] + 1})
    built = inverse.built
    if built is None or any_in_parts(built.solution.tensors) or not math.isfinite(built.spectrum.horizon):
        return RoleState({"uses": 0, "serves": 0, "inverse": {}}) if state.shared["uses"] else RoleState()
    saved = built.saved()
    return RoleState({"inverse": saved, "uses": 1, "serves": max(min(2 * state.shared["serves"], saved["k"] // 2), 1)})
