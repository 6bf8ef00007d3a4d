"""Where a hypergradient leaves its inverse for the response of the upper step that follows.

Both take P from the same products, but they are two calls of the user's, with nothing handed from one to the other.
What they have in common is the lower tensors: an inverse is kept under the first of them, weakly, and for those only
for which an upper step `expect`s one. It is given away once, and only if it is that of the same point and sample:

* the right side f_y is the one that the basis was built from;
* the lower loss g(x, y) has the value that it had then: another batch, or an x or y that has moved, have another one;
* the solver is the same.

Otherwise the step uses a basis of its own (`adaptive_bilevel.bilevel.kept_inverse`), for up to k products more. Nothing
wrong comes of a miss.

A lower loss that draws random numbers (dropout, noise, a batch) is another one at each evaluation. So the random state
before its evaluation is left, too: under it, the step evaluates the same loss again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..evaluation.guard import RandomState
from ..evaluation.vectors import rounding
from .lanczos import Lanczos
from .solution import LinearSolver, MatVec, Solution
from .spectral_inverse import SpectralInverse

__all__ = ["expect", "leave", "random_state", "solve", "take", "waits"]


class _Left(NamedTuple):
    solver: Lanczos
    inverse: SpectralInverse
    loss: float | None
    random: RandomState | None


_left: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def expect(lower: Sequence[Tensor]) -> None:
    """Keep the inverses that will be left for these lower tensors; before it, none is."""
    if lower:
        _left.setdefault(lower[0], None)


def waits(lower: Sequence[Tensor]) -> bool:
    """Return whether an inverse was left that nothing has taken yet: a solve then costs no product."""
    return bool(lower) and _left.get(lower[0]) is not None


def leave(
    lower: Sequence[Tensor],
    solver: Lanczos,
    inverse: SpectralInverse,
    loss: Tensor | float | None,
    random: RandomState | None = None,
) -> None:
    """Leave an inverse for the next `take`, in place of the one before; nothing happens if none is expected.

    Args:
        lower: The tensors of y.
        solver: Whose inverse it is.
        inverse: At this y.
        loss: The lower loss that its products are those of; None: the next `take` is known to be at the same point.
        random: Random state before the lower loss was evaluated; None: the next `take` knows how to evaluate it again.
    """
    if lower and lower[0] in _left:
        _left[lower[0]] = _Left(solver, inverse, None if loss is None else _number(loss), random)


def random_state(lower: Sequence[Tensor]) -> RandomState | None:
    """Return the random state that was left with an inverse, once; None: there is none."""
    left: _Left | None = _left.get(lower[0]) if lower else None
    if left is None:
        return None
    _left[lower[0]] = left._replace(random=None)
    return left.random


def solve(
    solver: LinearSolver,
    matvec: MatVec,
    rhs: Sequence[Tensor],
    lower: Sequence[Tensor],
    loss: Tensor,
    initial: Sequence[Tensor] | None = None,
    random: RandomState | None = None,
) -> Solution:
    """Return P rhs for a hypergradient, and leave the inverse if it is one that can serve the response too.

    Args:
        solver: P.
        matvec: The product with H.
        rhs: f_y.
        lower: The tensors of y.
        loss: The lower loss.
        initial: Where the solver starts.
        random: As in `leave`.
    """
    if not isinstance(solver, Lanczos):
        return solver.solve(matvec, rhs, initial)
    inverse = solver.basis(matvec, rhs)
    leave(lower, solver, inverse, loss, random)
    return inverse.solution


def take(
    lower: Sequence[Tensor], solver: Lanczos, rhs: Sequence[Tensor], loss: Tensor | float
) -> SpectralInverse | None:
    """Return the inverse that was left if it is that of this right side and loss, else None; it is gone then.

    Args:
        lower: The tensors of y.
        solver: What a basis would be built with otherwise.
        rhs: The right side f_y.
        loss: The lower loss.
    """
    left: _Left | None = _left.get(lower[0]) if lower else None
    if left is None:
        return None
    _left[lower[0]] = None
    fits = left.solver == solver and (left.loss is None or _same(left.loss, _number(loss), 16.0 * rounding(lower)))
    return left.inverse if fits and left.inverse.built_from(rhs) else None


def _same(one: float, other: float, unit: float) -> bool:
    return math.isclose(one, other, rel_tol=unit, abs_tol=0.0)


def _number(loss: Tensor | float) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss
