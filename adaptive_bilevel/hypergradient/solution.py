"""Linear solvers, and their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ..errors import warn
from ..evaluation import foreach
from ..evaluation.vectors import Vector, dot, zeros_like

__all__ = [
    "HessianReport",
    "LinearSolver",
    "MatVec",
    "Refinable",
    "Solution",
    "SolverStatus",
    "described",
    "relative_residual",
    "report",
    "trivial_solution",
]

MatVec: TypeAlias = Callable[[Vector], Sequence[Tensor]]


class SolverStatus(IntEnum):
    """The reason why a solve ended. `sentence` has it in words.

    >>> SolverStatus.negative_curvature.sentence
    'met a direction of negative curvature: the lower Hessian is indefinite here, the best iterate so far is kept'
    """

    converged = 0
    iteration_limit = 1
    negative_curvature = 2
    diverging = 3
    zero_rhs = 4
    non_finite = 5
    complete = 6
    indefinite = 7
    singular = 8
    flat = 9
    asymmetric = 10
    vanishing_curvature = 11

    @property
    def sentence(self) -> str:
        """The sentence a user reads."""
        return _SENTENCES[self]

    @property
    def ended_by_curvature(self) -> bool:
        """Whether the solver is no inverse of this H, because no positive curvature was found."""
        return self in _NO_INVERSE


_NO_INVERSE = (
    SolverStatus.negative_curvature,
    SolverStatus.vanishing_curvature,
    SolverStatus.diverging,
    SolverStatus.flat,
)

_SENTENCES = {
    SolverStatus.converged: "the relative residual met the tolerance",
    SolverStatus.iteration_limit: "the iteration limit came before the tolerance",
    SolverStatus.negative_curvature: (
        "met a direction of negative curvature: the lower Hessian is indefinite here, the best iterate so far is kept"
    ),
    SolverStatus.diverging: (
        "a factor (I - scale H) made its vector grow: scale is above 2 / (largest eigenvalue of H), or H is "
        "indefinite; the growing term and all after it are left out"
    ),
    SolverStatus.zero_rhs: "the right side is zero, so the solution is zero",
    SolverStatus.non_finite: "a number that is not finite came up: what was computed before it is kept",
    SolverStatus.complete: "all terms were taken",
    SolverStatus.indefinite: (
        "the lower Hessian is indefinite here: directions of negative curvature count with its absolute value"
    ),
    SolverStatus.singular: (
        "the lower Hessian is singular here, or has directions flatter than the solver resolves: the solution is "
        "bounded along them"
    ),
    SolverStatus.flat: (
        "the lower loss has no curvature in y, as a loss that is linear in y: there is no solution, zero is returned"
    ),
    SolverStatus.asymmetric: (
        "the products are not those of one symmetric matrix: the lower loss changes between products; the solution is "
        "that of a symmetric mean of them"
    ),
    SolverStatus.vanishing_curvature: (
        "met a direction with next to no curvature: the lower Hessian is singular here, or flatter than the iterations "
        "resolve; the best iterate so far is kept"
    ),
}


class Solution(NamedTuple):
    """The result of a solve of ``H v = b``.

    Attributes:
        tensors: v, in the shapes and dtypes of b, detached.
        iterations: Number of Hessian-vector products.
        residual: ``||b - H v|| / ||b||``; NaN if the solver does not compute it (`Identity`, and `Neumann` with
            ``random=True``).
        status: A `SolverStatus`.
    """

    tensors: Vector
    iterations: int
    residual: float
    status: SolverStatus


class HessianReport(NamedTuple):
    """A report of a solve on the lower Hessian H of its sample.

    Attributes:
        status: A `SolverStatus`. `Lanczos` reports `indefinite` and `singular`, `CG` reports `negative_curvature`.
        residual: ||b - H v|| / ||b|| of the solve; NaN if it is not known.
        smallest: The smallest Ritz value; NaN for solvers other than `Lanczos`.
        largest: The largest Ritz value, likewise.
        negative: The share of ||f_y||^2 along negative curvature, in [0, 1], likewise.
        error: Measured relative error of a product by differences; NaN for products by autograd.
        horizon: tau of `Lanczos`: curvatures below 1 / tau are not resolved. Infinite if its Krylov space is exhausted,
            so that all are; NaN for other solvers.
    """

    status: SolverStatus
    residual: float
    smallest: float = math.nan
    largest: float = math.nan
    negative: float = math.nan
    error: float = math.nan
    horizon: float = math.nan

    @property
    def norm(self) -> float:
        """The largest ``|t|`` of the Ritz values t; NaN if they are not known."""
        return max(abs(self.smallest), abs(self.largest))


class LinearSolver(Protocol):
    """A solver of ``H v = b`` that uses products with H only."""

    @property
    def warm_start(self) -> bool:
        """Whether the caller should pass the previous solution as ``initial``."""
        ...

    @property
    def resamples(self) -> bool:
        """Whether each product needs an independent sample of the lower loss."""
        ...

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return an approximation of ``H^{-1} rhs``, where ``matvec(v)`` is ``H v``."""
        ...


@runtime_checkable
class Refinable(Protocol):
    """A linear solver that knows how to solve further."""

    def refined(self) -> LinearSolver | None:
        """Return the solver solving further, or None if that is not possible."""
        ...


def described(solver: LinearSolver) -> str:
    """Return a solver as a text that is the same in every process: without addresses, and without a generator."""
    name = type(solver).__name__
    if not dataclasses.is_dataclass(solver):
        return name
    values = [f"{f.name}={getattr(solver, f.name)!r}" for f in dataclasses.fields(solver) if f.compare]
    return f"{name}({', '.join(values)})"


def report(solver: LinearSolver, solution: Solution, hypergradient: Sequence[Tensor]) -> None:
    """Warn if the solver is no inverse of H, or a product was not finite and the hypergradient does not show it."""
    status, hidden = solution.status, False
    if status is SolverStatus.non_finite:
        hidden = all(bool(tensor.isfinite().all()) for tensor in hypergradient)
    if status.ended_by_curvature or hidden:
        warn(f"{solver}: {solution.status.sentence}.")


def trivial_solution(rhs: Sequence[Tensor], size: float) -> Solution | None:
    """Return the solution for a right side that is zero or not finite, which passes through for the caller to see."""
    if size == 0.0:
        return Solution(zeros_like(rhs), 0, 0.0, SolverStatus.zero_rhs)
    if not math.isfinite(size):
        return Solution(tuple(tensor.detach().clone() for tensor in rhs), 0, math.nan, SolverStatus.non_finite)
    return None


def relative_residual(matvec: MatVec, v: Sequence[Tensor], rhs: Sequence[Tensor]) -> float:
    """Return ``||b - H v|| / ||b||``, which costs one product; 0 for b = 0.

    Args:
        matvec: The product with H.
        v: The solution.
        rhs: b.
    """
    left = foreach.sub(rhs, list(matvec(tuple(v))))
    size = dot(rhs, rhs)
    return math.sqrt(dot(left, left) / size) if size > 0.0 else 0.0
