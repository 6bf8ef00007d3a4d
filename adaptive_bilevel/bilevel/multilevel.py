"""The tangent of several lower problems, of which some may answer to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..hypergradient.products import Curvature
from .context import Change, Place, Point
from .inverse import Inverse, Solved
from .lower import LowerProblem
from .lower_change import change_between, effect_between, unanswered
from .tangent import TangentModel

__all__ = ["MultilevelTangent"]


class _Block:
    """One lower problem, with its curvature and what was solved with it.

    Attributes:
        problem: The problem g_j, with the indices of the blocks that y_j answers to, and -1 for x.
        places: Where its tensors are among all lower tensors.
        curvature: Products at (x, y); dropped by `close`.
        push: The right side of its tangent.
        solved: Its tangent w_j.
        gradient: grad_yj g_j at (x, y).
    """

    curvature: Curvature
    push: Sequence[Tensor]
    solved: Solved
    gradient: Sequence[Tensor]

    def __init__(self, problem: LowerProblem, places: Sequence[int]) -> None:
        self.problem, self.places = problem, places
        answers = problem.answers or (-1,)
        self.follows_upper = -1 in answers
        self.follows = [i for i in answers if i >= 0]


@final
class MultilevelTangent(TangentModel):
    """y_j(a) = y_j + a w_j with w_j = P_j (C_xj^T d - sum_i C_ij^T w_i), lowest first.

    C_ij is the mixed derivative of g_j by y_i and y_j, and P_j an inverse of the Hessian of g_j by y_j alone: the
    Hessian of the sum of all g_j is that of another problem as soon as one g_j depends on a y_i. The slope of
    phi(a) = f(x - a d, y_1 + a w_1, ...) is -s, s = <f_x, d> - sum_j <f_yj, w_j>, whatever the P_j.

    Args:
        point: Where the step begins.
        problems: The lower problems, lowest first; together they have all lower tensors, each once.
        inverse: P.
        products: How products are taken.
    """

    def __init__(
        self, point: Point, problems: Sequence[LowerProblem], inverse: Inverse, products: str = "auto"
    ) -> None:
        super().__init__(point, problems, inverse, products)
        places = {id(p): i for i, p in enumerate(point.lower)}
        self._blocks = [_Block(problem, [places[id(p)] for p in problem.tensors]) for problem in problems]
        for block in self._blocks:
            moving = list(point.gradient.tensors) if block.follows_upper else []
            for i in block.follows:
                moving += problems[i].tensors
            block.curvature = self._curvature_of([block.problem], moving, block.problem.tensors).curvature

    def _push_forward(self, direction: Sequence[Tensor]) -> None:
        """Do nothing: what moves a problem is known when those before it have answered."""

    def _pushes(self) -> list[Tensor]:
        return self._arranged([block.push for block in self._blocks])

    @property
    def lower_gradient(self) -> Sequence[Tensor]:
        """The gradient of each problem by its own variable."""
        return self._arranged([block.gradient for block in self._blocks])

    def _arranged(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return what the blocks have, a tensor for each lower one."""
        pairs = zip(self._blocks, parts, strict=True)
        found = {i: t for block, part in pairs for i, t in zip(block.places, part, strict=True)}
        return [found[i] for i in range(len(self._lower))]

    def _solve(self, *, finer: bool = False) -> None:
        starts = [block.solved.tensors for block in self._blocks] if finer else [None] * len(self._blocks)
        for block, start in zip(self._blocks, starts, strict=True):
            moves = list(self.path.along) if block.follows_upper else []
            for i in block.follows:
                moves += foreach.neg(self._blocks[i].solved.tensors)
            block.push = block.curvature.cross_jvp(moves)
            block.solved = self._inverse.solve(block.curvature.hvp, block.push, start, finer=finer)
        self._set_slope(self._arranged([block.solved.tensors for block in self._blocks]))

    def hypergradient(self) -> list[Tensor]:
        """Return f_x - sum_j C_xj v_j, with v_j = P_j (f_yj - sum_k C_jk v_k) over the problems k that answer to j."""
        total = list(self._f_x)
        adjoints = [[self._f_y[i] for i in block.places] for block in self._blocks]
        with torch.enable_grad():
            for j in reversed(range(len(self._blocks))):
                block = self._blocks[j]
                v = self._inverse.dual(block.curvature.hvp, adjoints[j])
                back = list(block.curvature.cross_vjp(v))
                if block.follows_upper:
                    total = foreach.sub(total, back[: len(total)])
                    back = back[len(total) :]
                for i in block.follows:
                    adjoints[i] = foreach.sub(adjoints[i], back[: len(adjoints[i])])
                    back = back[len(adjoints[i]) :]
        return total

    def close(self) -> None:
        """Drop the graphs and what only solves need."""
        for block in self._blocks:
            block.gradient = block.curvature.gradient
        super().close()

    def _drop_graph(self) -> None:
        for block in self._blocks:
            self._count(block.curvature)
            del block.curvature

    def confirm(self, place: Place) -> None:
        """Do nothing: every loss was evaluated at (x, y)."""

    def changes(self) -> list[Change]:
        """Return how far every lower gradient is from where it was."""
        return [
            change_between(block.gradient, self._gradient_of(block), block.push, block.solved.residual)
            for block in self._blocks
        ]

    def effects(self) -> list[Change]:
        """Return how far every lower gradient is from its linear model if its own variable does not move."""
        effects = []
        for block in self._blocks:
            with unanswered(list(block.problem.tensors), block.solved.tensors, self._step):
                moved = self._gradient_of(block)
            effects.append(effect_between(block.gradient, moved, block.push, self._step))
        return effects

    def _gradient_of(self, block: _Block) -> list[Tensor]:
        tensors = list(block.problem.tensors)
        _, grads = self._guard.gradient(block.problem.closure, tensors, block.problem.random)
        self._counts.gradients += 1
        return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, grads, strict=True)]

    def correction(self) -> float | None:
        """Return None: it would take an adjoint solve through the chain."""
        return None
