"""The inverse P of a response: the choice of its solver, and whether that solver measures its error."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from torch import Tensor

from ..hypergradient.cg import CG, Adjoint, dual_correction
from ..hypergradient.lanczos import Lanczos
from ..hypergradient.solution import HessianReport, LinearSolver, MatVec, Refinable
from ..hypergradient.solvers import Identity, Neumann
from ..hypergradient.spectral_inverse import SpectralInverse

__all__ = ["Inverse", "IterativeInverse", "SharedInverse", "Solved", "certified", "inverse_of", "refined", "transient"]

Left = Callable[[Lanczos], SpectralInverse | None]
"""Returns what the hypergradient left behind for this point and sample, if it is that of the solver; else None."""


class Solved(NamedTuple):
    """A solution w = P b.

    Attributes:
        tensors: w.
        residual: ||b - H w|| / ||b||. 0 for a solver that does not measure it.
        remainder: b - H w; None: not known.
    """

    tensors: Sequence[Tensor]
    residual: float
    remainder: Sequence[Tensor] | None = None


class Inverse(abc.ABC):
    """P of one upper step.

    Attributes:
        certified: Whether the solver given measures its error, so that its slope can be compared with the user's.
        report: What the last solve has shown of H; None: there was none.
        built: What `Lanczos` has built, for want of an inverse that the hypergradient left; None: nothing.
        again: Whether the inverse of an earlier step is used in its place.
    """

    certified = True
    report: HessianReport | None = None
    built: SpectralInverse | None = None
    again = False

    @abc.abstractmethod
    def observe(self, functional: Sequence[Tensor], product: MatVec, left: Left) -> None:
        """Learn of f_y, so that P f_y takes no product of its own; before any solve.

        Args:
            functional: f_y.
            product: v -> H v.
            left: Returns the basis that the hypergradient's `Lanczos` has built from f_y, or None.
        """

    @abc.abstractmethod
    def solve(
        self, product: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None, *, finer: bool = False
    ) -> Solved:
        """Return P rhs.

        Args:
            product: v -> H v.
            rhs: The right side.
            initial: Where to start.
            finer: With the next finer solver, this once; see `refinable`.
        """

    @abc.abstractmethod
    def dual(self, product: MatVec, functional: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return P f_y, for the hypergradient f_x - C P f_y."""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop what only solves need."""

    @property
    @abc.abstractmethod
    def refinable(self) -> bool:
        """Whether there is a finer solver."""

    @abc.abstractmethod
    def refine(self) -> bool:
        """Solve further from now on; False where that is not possible, or was asked for too often already."""

    @abc.abstractmethod
    def fall_back(self) -> bool:
        """Take the solver given from now on, if another one was in its place; return whether it was."""

    @abc.abstractmethod
    def correction(self, moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float | None:
        """Return -<v, moved - gradient>, what phi is to be corrected by; None: v = P f_y is not known."""


@final
class SharedInverse(Inverse):
    """P of `Lanczos`: one basis, built from f_y, for hypergradient and response; one product for the response.

    Args:
        solver: The solver given.
        earlier: The inverse of an earlier step, for want of one that the hypergradient left; None: there is none.
    """

    def __init__(self, solver: Lanczos, earlier: SpectralInverse | None = None) -> None:
        self._solver, self._earlier = solver, earlier
        self._basis: SpectralInverse | None = None
        self._dual: Sequence[Tensor] | None = None
        self._functional: Sequence[Tensor] = ()
        self._redirected = False

    def observe(self, functional: Sequence[Tensor], product: MatVec, left: Left) -> None:
        """Take the basis that the hypergradient left, or the earlier one, or build one."""
        self._functional = functional
        found = left(self._solver)
        if found is None and self._earlier is not None:
            found, self.again = self._earlier, True
        elif found is None:
            found = self.built = self._solver.basis(product, functional)
        self._basis, self.report = found, found.report()
        self._dual = None if self.again else found.solution.tensors

    def solve(
        self, product: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None, *, finer: bool = False
    ) -> Solved:
        """Return P rhs, with the basis of f_y, or with one of its own if f_y is not known."""
        if self._basis is None:
            return _solved(self, self._solver, product, rhs)
        if self.again and self._redirected:  # P is that of the hypergradient: c as it is
            return Solved(self._basis.apply(rhs), 0.0)
        solution, remainder = self._basis.extend(product, rhs)
        if self.again:
            self._dual = self._basis.apply(self._functional)
        return Solved(solution.tensors, 0.0, remainder)

    def dual(self, product: MatVec, functional: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return P f_y, which the basis has without a product."""
        return self._solver.solve(product, functional).tensors if self._dual is None else self._dual

    def close(self) -> None:
        """Drop the basis, and keep P f_y."""
        self._basis, self._earlier, self._functional = None, None, ()

    @property
    def refinable(self) -> bool:
        """False: the slope is exactly that of the hypergradient with this P."""
        return False

    def refine(self) -> bool:
        """Return True the first time: the hypergradient with this P has a positive slope as it is."""
        before, self._redirected = self._redirected, True
        return not before

    def fall_back(self) -> bool:
        """Return False."""
        return False

    def correction(self, moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float | None:
        """Return -<v, moved - gradient>."""
        return None if self._dual is None else dual_correction(self._dual, moved, gradient)


@final
class IterativeInverse(Inverse):
    """P of any other solver, or of `CG` in the place of one that does not measure its error.

    Args:
        solver: The solver given.
    """

    _MOST_REFINEMENTS = 2

    def __init__(self, solver: LinearSolver) -> None:
        self.certified = certified(solver)
        self._solver: LinearSolver = solver if self.certified else CG()
        self._fallback = None if self.certified else solver
        self._refinements = 0
        self._adjoint: Adjoint | None = None

    def observe(self, functional: Sequence[Tensor], product: MatVec, left: Left) -> None:
        """Let the products of the solves that follow give P f_y, too, for `CG`; take the scale of a series from f_y."""
        if isinstance(self._solver, Neumann) and (scale := self._solver.scaled(product, functional).scale) is not None:
            self._solver = dataclasses.replace(self._solver, scale=scale)
        self._adjoint = Adjoint(functional) if isinstance(self._solver, CG) else None

    def solve(
        self, product: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None, *, finer: bool = False
    ) -> Solved:
        """Return P rhs."""
        solver = refined(self._solver) if finer else self._solver
        assert solver is not None
        return _solved(self, solver, product, rhs, initial, self._adjoint)

    def dual(self, product: MatVec, functional: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return P f_y by a solve of its own."""
        return self._solver.solve(product, functional).tensors

    def close(self) -> None:
        """Do nothing: the solver keeps nothing."""

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
        self._solver, self._fallback, self._adjoint = self._fallback, None, None
        return True

    def correction(self, moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float | None:
        """Return -<v, moved - gradient>, where the solver is `CG`."""
        return None if self._adjoint is None else self._adjoint.correction(moved, gradient)


def inverse_of(solver: LinearSolver, earlier: SpectralInverse | None = None) -> Inverse:
    """Return P of one upper step.

    Args:
        solver: The solver given.
        earlier: As for `SharedInverse`.
    """
    return SharedInverse(solver, earlier) if isinstance(solver, Lanczos) else IterativeInverse(solver)


def _solved(
    inverse: Inverse,
    solver: LinearSolver,
    product: MatVec,
    rhs: Sequence[Tensor],
    initial: Sequence[Tensor] | None = None,
    adjoint: Adjoint | None = None,
) -> Solved:
    if adjoint is not None and isinstance(solver, CG):
        solution = solver.solve(product, rhs, initial, adjoint=adjoint)
    else:
        solution = solver.solve(product, rhs, initial)
    inverse.report = HessianReport(solution.status, solution.residual)
    return Solved(solution.tensors, 0.0 if math.isnan(solution.residual) else solution.residual)


def certified(solver: LinearSolver) -> bool:
    """Return whether a solver knows how far it is from the inverse."""
    return not (isinstance(solver, Identity) or bool(getattr(solver, "resamples", False)))


def transient(solver: LinearSolver) -> bool:
    """Return whether P b is what a number of gradient steps make of b (a Neumann series), rather than a solution."""
    return isinstance(solver, Neumann) and not solver.random


def refined(solver: LinearSolver) -> LinearSolver | None:
    """Return the solver solving further: CG to a tenth of the tolerance, Neumann with twice the terms; else None."""
    if isinstance(solver, Refinable):
        return solver.refined()
    if isinstance(solver, CG):
        return dataclasses.replace(solver, tolerance=solver.tolerance / 10, max_iterations=2 * solver.max_iterations)
    if isinstance(solver, Neumann) and not solver.random:
        return dataclasses.replace(solver, steps=2 * solver.steps + 1)
    return None
