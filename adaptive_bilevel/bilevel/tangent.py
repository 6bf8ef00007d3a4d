"""The tangent of the lower solution along a path: y + a w, w = P C^T d."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.guard import RandomState
from ..evaluation.reductions import on_host
from ..evaluation.vectors import Vector, inners
from ..hypergradient.difference_products import LowerLoss
from ..hypergradient.lanczos import Lanczos
from ..hypergradient.products import Curvature, Sampled, curvature_of, resumed, say_unresolved
from ..hypergradient.same_point import handover
from ..hypergradient.shared_basis import expect, random_state, take
from ..hypergradient.solution import HessianReport
from ..hypergradient.spectral_inverse import SpectralInverse
from ..optim.search_path import SearchPath
from .context import Change, LowerLossChanged, Place, Point
from .inverse import Inverse
from .lower import LowerProblem
from .lower_change import change_between, effect_between, unanswered

__all__ = ["JointTangent", "TangentModel"]


class TangentModel(abc.ABC):
    """A tangent that is solved for.

    Args:
        point: Where the step begins.
        problems: The lower problems.
        inverse: P.
        products: How products are taken, as for `adaptive_bilevel.hypergradient.implicit`.
    """

    path: SearchPath
    slope: float
    slope_ratio: float
    comparable: bool
    offsets: Sequence[Tensor] | None = None
    curvature = math.nan
    _step = 0.0

    def __init__(
        self, point: Point, problems: Sequence[LowerProblem], inverse: Inverse, products: str = "auto"
    ) -> None:
        self._guard, self._counts = point.guard, point.counts.lower
        self._problems, self._inverse, self._products, self._error = problems, inverse, products, math.nan
        self.comparable = inverse.certified
        self._lower, self._f_x, self._f_y = point.lower, point.f_x, point.f_y

    @property
    def hessian(self) -> HessianReport | None:
        """What the last solve has shown of the lower Hessian."""
        found = self._inverse.report
        return found if found is None else found._replace(error=self._error)

    @property
    def inverse(self) -> Inverse:
        """P."""
        return self._inverse

    def along(self, path: SearchPath) -> None:
        """Solve for w and the slope s along a path."""
        self.path = path
        with torch.enable_grad():
            self._push_forward(path.along)
            self._solve()
            if self.slope <= 0.0 and self._inverse.refinable:
                # The solver's error may have the last word on the sign: solve further once, then decide.
                self._solve(finer=True)
            if self.slope <= 0.0 and self._inverse.fall_back():
                self._solve()

    @property
    def blind(self) -> bool:
        """Whether nothing that is evaluated depends on what moves along the path: C^T d and <f_x, d> are zero."""
        return self.slope == 0.0 and self.path.promised > 0.0 and not any(bool(t.any()) for t in self._pushes())

    @abc.abstractmethod
    def _pushes(self) -> list[Tensor]:
        """Return C^T d of all problems, arranged as y."""

    @property
    @abc.abstractmethod
    def lower_gradient(self) -> Sequence[Tensor]:
        """grad_y g at (x, y), arranged as y; known after `close`."""

    @abc.abstractmethod
    def confirm(self, place: Place) -> None:
        """Raise `LowerLossChanged` if g is no longer what the tangent was computed from."""

    def refine(self) -> bool:
        """Solve further from now on; False where that is not possible, or was asked for twice already."""
        return self._inverse.refine()

    def answer(self, step: float) -> None:
        """Move y by step * w (it is at y)."""
        assert self.offsets is not None
        self._step = step
        foreach.add_(self._lower, self.offsets, alpha=step)

    @abc.abstractmethod
    def _push_forward(self, direction: Sequence[Tensor]) -> None:
        """Compute C^T d."""

    @abc.abstractmethod
    def _solve(self, *, finer: bool = False) -> None:
        """Set `offsets` and `slope`; `finer`: solving further, from the last w."""

    def _set_slope(self, offsets: Sequence[Tensor]) -> None:
        self.offsets = offsets
        direct, answered = inners((self._f_x, self.path.along), (self._f_y, offsets))
        squares = inners((self._pushes(), offsets), (offsets, offsets))
        self.slope, pushed, square = on_host(direct - answered, *squares)
        self.curvature = pushed / square if square > 0.0 else math.nan

    @abc.abstractmethod
    def hypergradient(self) -> list[Tensor]:
        """Return the hypergradient with the same P."""

    @abc.abstractmethod
    def changes(self) -> list[Change]:
        """Return how the lower gradients at the candidate in place differ from those at (x, y)."""

    @abc.abstractmethod
    def effects(self) -> list[Change]:
        """Return how far they are there from the linear model of C if x moves alone."""

    @abc.abstractmethod
    def correction(self) -> float | None:
        """Return what the last changes mean for f; None if not known."""

    def close(self) -> None:
        """Drop the graph and what only solves need: parameters are about to move."""
        self._drop_graph()
        self._inverse.close()
        self._f_x, self._f_y = [], []

    @abc.abstractmethod
    def _drop_graph(self) -> None:
        """Drop the graphs, and count what they were used for."""

    def _curvature_of(
        self, problems: Sequence[LowerProblem], upper: Sequence[Tensor], lower: Sequence[Tensor]
    ) -> Sampled:
        """Return the loss of some problems, and products of it."""
        loss = LowerLoss(self._guard, [(p.closure, p.random) for p in problems])
        with torch.enable_grad():
            return curvature_of(self._products, loss, upper, lower, moves=True)

    def _count(self, curvature: Curvature) -> None:
        self._error = curvature.error
        say_unresolved(self._lower, curvature.error)
        self._counts.gradients += curvature.gradients
        self._counts.hvps += curvature.hvps
        self._counts.jvps += curvature.jvps


@final
class JointTangent(TangentModel):
    """The tangent of the minimizer of the sum of all lower losses."""

    _confirmed: bool

    def __init__(
        self, point: Point, problems: Sequence[LowerProblem], inverse: Inverse, products: str = "auto"
    ) -> None:
        super().__init__(point, problems, inverse, products)
        self._upper = point.gradient.tensors
        self._problems = _under(random_state(point.lower), problems)
        self._curvature = self._taken_over() or self._differentiated()
        self._pushed = False
        inverse.observe(point.f_y, self._curvature.hvp, self._left)

    def _differentiated(self) -> Curvature:
        self._loss, curvature, _ = self._curvature_of(self._problems, self._upper, self._lower)
        self._confirmed = True
        if (left := handover(self._lower)) is not None and curvature.exact:
            left.compare_lower(self._loss, self._upper, self._lower, curvature.gradient)
        return curvature

    def _taken_over(self) -> Curvature | None:
        """Return products with the graph that the hypergradient left, if it is that of this point and sample."""
        left, replayed = handover(self._lower), all(problem.random is not None for problem in self._problems)
        if left is None or not replayed or self._products == "difference":
            return None
        taken = left.take_lower(self._upper, self._lower)
        if taken is None:
            return None
        self._confirmed, (self._loss, exact) = False, taken
        loss = LowerLoss(self._guard, [(p.closure, p.random) for p in self._problems])
        return resumed(self._products, exact, loss, self._upper, self._lower)

    def _left(self, solver: Lanczos) -> SpectralInverse | None:
        """Return the inverse that the hypergradient left for this point and sample, if it did."""
        expect(self._lower)
        return take(self._lower, solver, self._f_y, self._loss)

    def _push_forward(self, direction: Sequence[Tensor]) -> None:
        if self._pushed:
            self._drop_graph()  # it has forgotten the loss, and a projection may have written to x meanwhile
            self.offsets, self._curvature = None, self._differentiated()
        self._push = self._curvature.cross_jvp(direction)
        self._curvature.forget_loss()
        self._pushed = True

    def _pushes(self) -> list[Tensor]:
        return list(self._push)

    @property
    def lower_gradient(self) -> Sequence[Tensor]:
        """grad_y g of the sum at (x, y)."""
        return self._gradient

    def _solve(self, *, finer: bool = False) -> None:
        initial = self.offsets if finer else None
        solved = self._inverse.solve(self._curvature.hvp, self._push, initial, finer=finer)
        self._residual, self._remainder = solved.residual, solved.remainder
        self._set_slope(solved.tensors)

    def hypergradient(self) -> list[Tensor]:
        """Return f_x - C P f_y."""
        with torch.enable_grad():
            v = self._inverse.dual(self._curvature.hvp, self._f_y)
            return foreach.sub(self._f_x, list(self._curvature.cross_vjp(v)))

    def confirm(self, place: Place) -> None:
        """Evaluate g at (x, y), once, if its derivatives were taken over."""
        if self._confirmed:
            return
        self._confirmed, step = True, self._step
        self._guard.put_back()
        self._counts.values += 1
        terms = [torch.as_tensor(self._guard.value(p.closure, p.random)) for p in self._problems]
        left = handover(self._lower)
        if left is not None and not left.confirms_lower(torch.stack(terms).sum(), self._upper, self._lower):
            raise LowerLossChanged
        place(step)

    def close(self) -> None:
        """Drop the graph and what only solves need."""
        self._gradient = self._curvature.gradient
        super().close()

    def _drop_graph(self) -> None:
        self._count(self._curvature)
        del self._curvature

    def changes(self) -> list[Change]:
        """Return how far the gradient of the sum is from where it was."""
        self._moved, expected = self._gradient_here(), None
        if self._remainder is not None:  # what a linear lower gradient would do is known, so it is no surprise
            expected = foreach.sub(self._gradient, self._remainder, alpha=self._step)
        return [change_between(self._gradient, self._moved, self._push, self._residual, expected)]

    def effects(self) -> list[Change]:
        """Return how far the gradient of the sum is from grad_y g(x, y) - step C^T d at (x - step d, y)."""
        assert self.offsets is not None
        with unanswered(self._lower, self.offsets, self._step):
            moved = self._gradient_here()
        return [effect_between(self._gradient, moved, self._push, self._step)]

    def _gradient_here(self) -> Vector:
        total: Vector | None = None
        for problem in self._problems:
            _, grads = self._guard.gradient(problem.closure, self._lower, problem.random)
            filled = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(self._lower, grads, strict=True))
            total = filled if total is None else tuple(foreach.add(total, filled))
        self._counts.gradients += 1
        assert total is not None
        return total

    def correction(self) -> float | None:
        """Return -<v, delta>."""
        return self._inverse.correction(self._moved, self._gradient)


def _under(random: RandomState | None, problems: Sequence[LowerProblem]) -> Sequence[LowerProblem]:
    """Return the problems as the hypergradient saw them: one after the other from a random state, if there is one."""
    if random is None:
        return problems
    states = [random, *[None] * (len(problems) - 1)]
    return [
        problem if problem.random is None else problem._replace(random=state)  # without one, the closure sees to it
        for problem, state in zip(problems, states, strict=True)
    ]
