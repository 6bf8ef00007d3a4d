"""The inverse P of a response: which solver it is, and whether it can be trusted, is decided here only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, final

from torch import Tensor

from ..hypergradient.cg import CG, Adjoint
from ..hypergradient.solution import LinearSolver, MatVec, Refinable
from ..hypergradient.solvers import Identity, Neumann

__all__ = ["Inverse", "Solved", "certified", "refined"]


class Solved(NamedTuple):
    """A solution w = P b.

    Attributes:
        tensors: w.
        residual: ||b - H w|| / ||b||. A solver that does not know it gets no allowance for it: 0.
    """

    tensors: Sequence[Tensor]
    residual: float


@final
class Inverse:
    """P of one upper step: the solver given, or `CG` in the place of one that does not know its error.

    Args:
        solver: The solver given.

    Attributes:
        certified: Whether the solver given knows its error, so that its slope can be compared with the user's.
        adjoint: v = P f_y, see `observe`; None: not known.
    """

    _MOST_REFINEMENTS = 2

    def __init__(self, solver: LinearSolver) -> None:
        self.certified = certified(solver)
        self._solver: LinearSolver = solver if self.certified else CG()
        self._fallback = None if self.certified else solver
        self._refinements = 0
        self.adjoint: Adjoint | None = None

    def observe(self, functional: Sequence[Tensor]) -> None:
        """Let the products of the solves that follow give P `functional`, too, where the solver is `CG`."""
        self.adjoint = Adjoint(functional) if isinstance(self._solver, CG) else None

    def solve(
        self,
        product: MatVec,
        rhs: Sequence[Tensor],
        initial: Sequence[Tensor] | None = None,
        *,
        finer: bool = False,
        observed: bool = True,
    ) -> Solved:
        """Return P rhs.

        Args:
            product: v -> H v.
            rhs: The right side.
            initial: Where to start.
            finer: With the next finer solver, this once; see `refinable`.
            observed: Whether the products serve the adjoint, too.
        """
        solver = refined(self._solver) if finer else self._solver
        assert solver is not None
        if observed and self.adjoint is not None and isinstance(solver, CG):
            solution = solver.solve(product, rhs, initial, adjoint=self.adjoint)
        else:
            solution = solver.solve(product, rhs, initial)
        return Solved(solution.tensors, 0.0 if math.isnan(solution.residual) else solution.residual)

    @property
    def refinable(self) -> bool:
        """Whether there is a finer solver."""
        return refined(self._solver) is not None

    def refine(self) -> bool:
        """Solve further from now on; False where that is not possible, or was asked for twice already."""
        finer = refined(self._solver)
        if finer is None or self._refinements == self._MOST_REFINEMENTS:
            return False
        self._solver, self._refinements = finer, self._refinements + 1
        return True

    def fall_back(self) -> bool:
        """Take the solver given from now on, if `CG` was in its place; return whether it was."""
        if self._fallback is None:
            return False
        self._solver, self._fallback, self.adjoint = self._fallback, None, None
        return True


def certified(solver: LinearSolver) -> bool:
    """Return whether a solver knows how far it is from the inverse."""
    return not (isinstance(solver, Identity) or bool(getattr(solver, "resamples", False)))


def refined(solver: LinearSolver) -> LinearSolver | None:
    """Return the solver solving further: CG to a tenth of the tolerance, Neumann with twice the terms; else None."""
    if isinstance(solver, Refinable):
        return solver.refined()
    if isinstance(solver, CG):
        return dataclasses.replace(solver, tolerance=solver.tolerance / 10, max_iterations=2 * solver.max_iterations)
    if isinstance(solver, Neumann) and not solver.random:
        return dataclasses.replace(solver, steps=2 * solver.steps + 1)
    return None
