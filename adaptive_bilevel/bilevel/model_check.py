"""Whether a tangent can be believed: what an upper search asks about a candidate that passed its test of decrease.

The searched function phi(a) = f(x - a d, y + a w) takes the lower solution to be on its tangent. How wrong that is at
a candidate shows in the lower gradient, which should not change: delta = grad_y g(x - a d, y + a w) - grad_y g(x, y).

* `Belief`: how large the change is, and whether a shorter step would mend it.
* `Adjoint`, with `CG` as solver: what a change that is too large means for f. The lower solution is at y + a w -
  H^{-1} delta, so F(x - a d) is phi(a) - <v, delta>, v = H^{-1} f_y, up to terms of second order in H^{-1} delta; where
  that passes the test of decrease too, the change does no harm. (The dual-weighted residual of Becker and Rannacher,
  the adjoint correction of Pierce and Giles.)

The first alone is blind to what a change is good for: in hyper-representation on minibatches with CG 10, most of it is
in directions that f hardly looks at and that the lower steps mend at once, and half of the steps were cut for it. The
second alone ends steps at 1e-6 where v cannot be had: the kinks of a ReLU network as lower variable (iMAML, CG 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluation.reductions import agree
from ..evaluation.vectors import inner

__all__ = ["Adjoint", "Belief", "Change"]


class Adjoint:
    """v = P f_y, P being that of a CG solve for another right side, from the products that this solve takes.

    After k iterations from zero, CG's iterate is P b with P = sum_i p_i p_i^T / <p_i, H p_i> over its directions,
    which does not depend on b once they are there. So the same P applied to f_y takes no product of its own, and the
    slope s = <f_x, d> - <f_y, P C^T d> is exactly that of the hypergradient f_x - C v. Galerkin orthogonality,
    <v, C^T d - H w> = 0, keeps what the solve has left undone out of the correction.

    Args:
        functional: f_y.
    """

    def __init__(self, functional: Sequence[Tensor]) -> None:
        self._functional = list(functional)
        self.tensors = list(torch._foreach_mul(self._functional, 0.0))

    def observing(self, matvec: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
        """Return the product with H, with v projected on each vector that is multiplied."""

        def product(p: Sequence[Tensor]) -> Sequence[Tensor]:
            image = matvec(p)
            curvature = float(inner(p, image))
            if curvature > 0.0 and math.isfinite(curvature):
                rest = float(inner(p, self._functional) - inner(image, self.tensors))
                torch._foreach_add_(self.tensors, list(p), alpha=rest / curvature)
            return image

        return product

    def correction(self, moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
        """Return -<v, delta>, what phi is to be corrected by.

        Args:
            moved: The lower gradient at the candidate.
            gradient: The lower gradient at (x, y).
        """
        delta = torch._foreach_sub(list(moved), list(gradient))
        return -float(agree(inner(self.tensors, delta))[0])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(max(float(inner(tensors, tensors)), 0.0))


class Change(NamedTuple):
    """How a lower gradient changed along a tangent.

    Attributes:
        size: The norm of the change.
        push: ||C^T d||: without any answer of y, the change would be step * push to first order.
        residual: ||C^T d - H w|| / ||C^T d||: with the answer w, it still is that part of it.
        rounding: What of `size` may be rounding.
    """

    size: float
    push: float
    residual: float
    rounding: float

    @classmethod
    def between(cls, old: Sequence[Tensor], new: Sequence[Tensor], push: Sequence[Tensor], residual: float) -> Change:
        """Return the change from one gradient to another."""
        rounding = 8.0 * max(torch.finfo(g.dtype).eps for g in old) * (_norm(new) + _norm(old))
        size, pushed = (float(v) for v in agree(_norm(torch._foreach_sub(list(new), list(old))), _norm(push)))
        return cls(size, pushed, residual, rounding)


class Belief:
    """Whether a tangent can be believed at a step: what its linear model ignores must be small.

    Along the exact tangent the lower gradient does not change to first order, so a change below (tolerance + residual)
    * step * ||C^T d|| passes. A larger one is looked at again at half of the step. What a smooth lower loss adds is of
    second order: there it is a quarter, and the search goes on to shorter steps. Where it is half or more, no shorter
    step is believed any better, so this one passes: samples cross kinks of a ReLU network, by which its gradient
    jumps. Rejected for them, steps would shrink until not one sample crosses a kink any more.

    One that is not finite never passes.

    A change that is as large as without any answer of y says that the model does not reach the candidate: it is never
    excused for what a correction of first order makes of it. (In iMAML, query accuracy fell from .69 to .56 by one such
    step.) A bounded gradient also stops changing far out, where it saturates; so such a change does not pass at all
    until a candidate was rejected for what a shorter step would mend; unless the solve itself has left as much, so that
    no shorter step would change less.

    Args:
        tolerance: As above; inf: no test.
        resumed: Whether the search starts from a step that was accepted before. If not, nothing is excused: how far a
            linear model reaches is not known, and a correction of first order knows it no better.
    """

    def __init__(self, tolerance: float, resumed: bool) -> None:
        self._tolerance, self._resumed, self._inside = tolerance, resumed, resumed

    def __call__(
        self,
        step: float,
        measure: Callable[[], Sequence[Change]],
        place: Callable[[float], None],
        excused: Callable[[], bool] | None = None,
    ) -> bool:
        """Return whether the tangent can be believed at the candidate in place; another may be there afterwards.

        Args:
            step: The step of the candidate.
            measure: Returns the changes of the lower gradients at what is in place.
            place: Puts the candidate of another step there.
            excused: Returns whether a change that is too large does no harm to f, see `Adjoint`; None: not known.
        """
        if math.isinf(self._tolerance):
            return True
        changes = [change for change in measure() if change.push != 0.0]
        if not all(math.isfinite(c.size) for c in changes):
            self._inside = True
            return False
        limits = [(self._tolerance + c.residual) * step * c.push + c.rounding for c in changes]
        if all(c.size <= limit for c, limit in zip(changes, limits, strict=True)):
            return True
        followed = all(c.residual >= 1.0 or c.size <= (1.0 + c.residual) * step * c.push + c.rounding for c in changes)
        if self._resumed and followed and excused is not None and excused():
            return True
        place(0.5 * step)
        halves = [change for change in measure() if change.push != 0.0]
        for c, half, limit in zip(changes, halves, limits, strict=True):
            if not (c.size <= limit or (half.size >= 0.5 * c.size and math.isfinite(half.size))):
                self._inside = True
                return False
        return self._inside or followed
