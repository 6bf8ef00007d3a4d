"""The tangent response of several lower problems, of which some may answer to others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_bilevel.bilevel.model_check import Belief, Change
from adaptive_bilevel.bilevel.response import TangentResponse
from adaptive_bilevel.evaluation.counts import Counts
from adaptive_bilevel.evaluation.guard import Closure, Guard
from adaptive_bilevel.evaluation.reductions import agree
from adaptive_bilevel.evaluation.vectors import inner
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.hypergradient.curvature import LowerCurvature

__all__ = ["Block", "ChainResponse"]


class Block(NamedTuple):
    """One lower problem.

    Attributes:
        closure: Its loss g_j.
        tensors: Its variable y_j.
        answers: Which variables it answers to: indices of blocks before it, and -1 for x.
    """

    closure: Closure
    tensors: Sequence[Tensor]
    answers: Sequence[int]


class ChainResponse(TangentResponse):
    """y_j(a) = y_j + a w_j with w_j = P_j (C_xj^T d - sum_i C_ij^T w_i), lowest first.

    C_ij is the mixed derivative of g_j by y_i and y_j, and P_j an inverse of the Hessian of g_j by y_j alone: the
    Hessian of the sum of all g_j is that of another problem as soon as one g_j depends on a y_i. The slope of
    phi(a) = f(x - a d, y_1 + a w_1, ...) is -s, s = <f_x, d> - sum_j <f_yj, w_j>, whatever the P_j.

    Args:
        guard: The step's guard.
        blocks: The lower problems, lowest first.
        upper: The upper tensors that move.
        lower: All lower tensors; each belongs to one block.
        partials: f_x and f_y.
        solver: P.
        belief: In the tangents.
        counts: Where lower oracle calls are counted.
    """

    def __init__(
        self,
        guard: Guard,
        blocks: Sequence[Block],
        upper: Sequence[Tensor],
        lower: Sequence[Tensor],
        partials: tuple[Sequence[Tensor], Sequence[Tensor]],
        solver: LinearSolver,
        belief: Belief,
        counts: Counts,
    ) -> None:
        self._guard, self._blocks, self._lower, self._counts = guard, list(blocks), lower, counts
        self._partials, self._belief = partials, belief
        self._positions = _positions(blocks, lower)
        self._curvatures: list[LowerCurvature] = []
        for block in blocks:
            moving = [*upper] if -1 in block.answers else []
            for i in (i for i in block.answers if i >= 0):
                moving += blocks[i].tensors
            with torch.enable_grad():
                loss = guard.attached(block.closure, guard.entry).reshape(())
                self._curvatures.append(LowerCurvature(loss, moving, block.tensors, moves=True))
        self.offsets: Sequence[Tensor] | None = None
        self._take(solver)

    def _push_forward(self, direction: Sequence[Tensor]) -> None:
        """Do nothing: what moves a problem is known when those before it have answered."""

    def _solve(self, direction: Sequence[Tensor], solver: LinearSolver, *, again: bool = False) -> None:
        initial = self._answers if again else [None] * len(self._blocks)
        self._answers: list[Sequence[Tensor]] = []
        self._pushes: list[Sequence[Tensor]] = []
        self._residuals: list[float] = []
        for block, curvature, start in zip(self._blocks, self._curvatures, initial, strict=True):
            moves = [*direction] if -1 in block.answers else []
            for i in (i for i in block.answers if i >= 0):
                moves += torch._foreach_neg(list(self._answers[i]))
            push = curvature.cross_jvp(moves)
            solution = solver.solve(curvature.hvp, push, start)
            self._pushes.append(push)
            self._answers.append(solution.tensors)
            self._residuals.append(0.0 if math.isnan(solution.residual) else solution.residual)
        f_x, f_y = self._partials
        self.offsets = self._flat(self._answers)
        self.slope = float(agree(inner(f_x, direction) - inner(f_y, self.offsets))[0])

    def hypergradient(self) -> list[Tensor]:
        """Return f_x - sum_j C_xj v_j, with v_j = P_j (f_yj - sum_k C_jk v_k) over the problems k that answer to j."""
        f_x, f_y = self._partials
        total = list(f_x)
        adjoints = [[f_y[i] for i in position] for position in self._positions]
        with torch.enable_grad():
            for j in reversed(range(len(self._blocks))):
                answers, curvature = self._blocks[j].answers, self._curvatures[j]
                solution = self._solvers[0].solve(curvature.hvp, adjoints[j])
                back = list(curvature.cross_vjp(solution.tensors))
                if -1 in answers:
                    total = list(torch._foreach_sub(total, back[: len(total)]))
                    back = back[len(total) :]
                for i in (i for i in answers if i >= 0):
                    adjoints[i] = list(torch._foreach_sub(adjoints[i], back[: len(adjoints[i])]))
                    back = back[len(adjoints[i]) :]
        return total

    def close(self) -> None:
        """Drop the graphs: parameters are about to move."""
        self._gradients = [curvature.gradient for curvature in self._curvatures]
        for curvature in self._curvatures:
            self._counts.gradients += curvature.gradients
            self._counts.hvps += curvature.hvps
            self._counts.jvps += curvature.jvps
        self._curvatures = []

    def certify(self, step: float, surplus: float, place: Callable[[float], None]) -> bool:
        """Return whether the tangents of all problems can be believed.

        By how much their gradients changed, whatever the solver: what that means for f would take an adjoint solve
        through the chain.
        """
        return self._belief(step, self._changes, place)

    def _changes(self) -> list[Change]:
        """Return how far every lower gradient is from where it was."""
        changes = []
        for block, before, push, residual in zip(
            self._blocks, self._gradients, self._pushes, self._residuals, strict=True
        ):
            _, grads = self._guard.gradient(block.closure, list(block.tensors), self._guard.entry)
            self._counts.gradients += 1
            now = [torch.zeros_like(p) if g is None else g for p, g in zip(block.tensors, grads, strict=True)]
            changes.append(Change.between(before, now, push, residual))
        return changes

    def _flat(self, by_block: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the tensors of the blocks in the order of all lower tensors."""
        found = {
            i: t
            for position, tensors in zip(self._positions, by_block, strict=True)
            for i, t in zip(position, tensors, strict=True)
        }
        return [found[i] for i in range(len(self._lower))]


def _positions(blocks: Sequence[Block], lower: Sequence[Tensor]) -> list[list[int]]:
    """Return, for each block, where its tensors are among all lower tensors."""
    places = {id(p): i for i, p in enumerate(lower)}
    return [[places[id(p)] for p in block.tensors] for block in blocks]
