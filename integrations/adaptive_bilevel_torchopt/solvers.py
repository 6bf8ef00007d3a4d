"""Linear solvers of TorchOpt as those of the response: the searched function answers as TorchOpt differentiates.

| ``linear_solve=`` of the module | the response is solved by |
|---|---|
| None (TorchOpt's default), ``solve_normal_cg(...)`` | CG on H H w = H b, same tolerance and cap |
| ``solve_cg(...)`` | `CG`, same tolerance and cap |
| ``solve_inv(ns=True, maxiter=, alpha=)`` | `Neumann`, same terms and scale |
| ``solve_inv()`` | a dense solve |
| a function of yours, ``(matvec, b) -> x`` | that function |

``UpperStep(solver=Lanczos())`` takes 11 products for the response, whatever is declared. It is not the default for
None: that names ``solve_normal_cg()``, of which TorchOpt's hypergradient is made. Where H is indefinite, that is
``H^{-1}`` and `Lanczos` is not, so that the searched function would have another slope than the hypergradient promises
(on a tanh network with 40 % of the labels drawn, `SlopeDiagnosis` reported it).

TorchOpt's ``ridge`` is kept; its ``init``, its preconditioner ``M`` and ``atol`` are not: the solve goes to ``rtol``.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from adaptive_bilevel.bilevel.inverse import refined
from adaptive_bilevel.errors import SolverError
from adaptive_bilevel.evaluation.vectors import inner
from adaptive_bilevel.hypergradient import CG, LinearSolver, Neumann
from adaptive_bilevel.hypergradient.solution import MatVec, Solution, SolverStatus, relative_residual

__all__ = ["Called", "DeclaredSolve", "Dense", "NormalCG", "Ridge", "SafeNeumann", "declared_solver"]

DeclaredSolve: TypeAlias = Callable[..., Any]
"""A module's ``linear_solve``: one of TorchOpt's solvers, or a function ``(matvec, b) -> x`` on tuples of tensors."""


@dataclass(frozen=True)
class _Exact(abc.ABC):
    """What the wrappers share: no warm start, and the same matrix in every product."""

    @property
    def warm_start(self) -> bool:
        """No solve starts from the previous solution."""
        return False

    @property
    def resamples(self) -> bool:
        """The same matrix is needed in every product."""
        return False

    @abc.abstractmethod
    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return an approximation of ``H^{-1} rhs``."""


@final
@dataclass(frozen=True)
class Ridge(_Exact):
    """A solver for (H + ridge I) w = b."""

    solver: LinearSolver
    ridge: float

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Solve with the shifted matrix."""
        return self.solver.solve(lambda v: _shifted(matvec(v), v, self.ridge), rhs, initial)

    def refined(self) -> LinearSolver | None:
        """Return the solver solving further."""
        finer = refined(self.solver)
        return None if finer is None else dataclasses.replace(self, solver=finer)


@final
@dataclass(frozen=True)
class NormalCG(_Exact):
    """CG on the normal equations (H H + ridge I) w = H b: for an H that is symmetric but not positive definite."""

    solver: CG
    ridge: float = 0.0

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Solve; the residual is that of H w = b, so it costs one product more."""
        products = 0

        def once(v: Sequence[Tensor]) -> Sequence[Tensor]:
            nonlocal products
            products += 1
            return matvec(tuple(v))

        squared: MatVec = lambda v: _shifted(once(once(v)), v, self.ridge)  # noqa: E731
        solution = self.solver.solve(squared, once(rhs), initial)
        residual = relative_residual(once, solution.tensors, rhs)
        return solution._replace(iterations=products, residual=residual)

    def refined(self) -> LinearSolver | None:
        """Return the solver solving further."""
        finer = dataclasses.replace(
            self.solver, tolerance=self.solver.tolerance / 10, max_iterations=2 * self.solver.max_iterations
        )
        return dataclasses.replace(self, solver=finer)


@final
@dataclass(frozen=True)
class SafeNeumann(_Exact):
    """`Neumann` that raises for a scale at which TorchOpt's series diverges, alpha ||H|| >= 2."""

    solver: Neumann

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return the series.

        Raises:
            SolverError: It diverges because the scale is too large (and not because H is indefinite).
        """
        solution = self.solver.solve(matvec, rhs, initial)
        if solution.status is SolverStatus.diverging:
            norm, alpha = _norm_of(matvec, rhs), self.solver.scale
            if alpha != "auto" and alpha * norm >= 2.0:
                raise SolverError(
                    f"linear_solve=solve_inv(ns=True, alpha={alpha:g}): the Neumann series diverges, since "
                    f"the lower Hessian has norm {norm:.3g} and alpha times that is not below 2; without alpha "
                    f"TorchOpt takes 1. Pass alpha below {2.0 / norm:.3g}, e.g. {1.0 / norm:.3g}, or use solve_cg()"
                )
        return solution

    def refined(self) -> LinearSolver | None:
        """Return the solver with twice the terms."""
        return dataclasses.replace(self, solver=dataclasses.replace(self.solver, steps=2 * self.solver.steps + 1))


@final
@dataclass(frozen=True)
class Dense(_Exact):
    """H from as many products as it has columns, and a direct solve."""

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Solve directly."""
        shapes = [t.shape for t in rhs]
        flat = torch.cat([t.reshape(-1) for t in rhs])
        if not bool(flat.any()):
            return Solution(tuple(torch.zeros_like(t) for t in rhs), 0, 0.0, SolverStatus.zero_rhs)
        columns = []
        for unit in torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device):
            columns.append(torch.cat([t.reshape(-1) for t in matvec(_split(unit, shapes))]))
        solved = torch.linalg.solve(torch.stack(columns, 1), flat)
        return Solution(_split(solved, shapes), len(columns), 0.0, SolverStatus.converged)


@final
@dataclass(frozen=True)
class Called(_Exact):
    """A solver of the user's, ``(matvec, b) -> x`` on tuples of tensors."""

    function: DeclaredSolve

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Call it, and look at the residual with one product."""
        products = 0

        def once(v: Sequence[Tensor]) -> tuple[Tensor, ...]:
            nonlocal products
            products += 1
            return tuple(matvec(tuple(v)))

        found = tuple(self.function(once, tuple(rhs)))
        residual = relative_residual(once, found, rhs)
        return Solution(tuple(t.detach() for t in found), products, residual, SolverStatus.complete)


def declared_solver(linear_solve: DeclaredSolve | None, lower: Sequence[Tensor]) -> LinearSolver:
    """Return the solver of the response for a module's ``linear_solve``.

    Args:
        linear_solve: What the module declares; None is TorchOpt's default, ``solve_normal_cg()``.
        lower: The lower parameters.

    Raises:
        SolverError: ``solve_inv()`` with several parameters, which TorchOpt solves block by block: a wrong answer.
    """
    host = getattr(getattr(linear_solve, "func", None), "__module__", "")
    if linear_solve is not None and not (
        isinstance(linear_solve, functools.partial) and host.startswith("torchopt.linear_solve.")
    ):
        return Called(linear_solve)
    options = {} if linear_solve is None else linear_solve.keywords
    kind = "normal_cg" if linear_solve is None else host.rpartition(".")[2]
    ridge = options.get("ridge") or 0.0
    if kind == "inv" and options.get("ns", False):
        alpha, terms = options.get("alpha"), options.get("maxiter")
        series = SafeNeumann(Neumann(10 if terms is None else terms, 1.0 if alpha is None else alpha))
        return Ridge(series, ridge) if ridge else series
    if kind == "inv":
        if len(lower) > 1:
            raise SolverError(
                f"linear_solve=solve_inv(): with {len(lower)} lower parameters TorchOpt uses the diagonal blocks of "
                "the Hessian only, and returns a wrong hypergradient. Declare solve_cg() or solve_normal_cg(), or put "
                "all lower variables into one tensor"
            )
        return Ridge(Dense(), ridge) if ridge else Dense()
    most = options.get("maxiter")
    most = 10 * sum(p.numel() for p in lower) if most is None else most  # TorchOpt's default
    solver = CG(max_iterations=max(int(most), 1), tolerance=float(options.get("rtol", 1e-5)))
    if kind == "normal_cg":
        return NormalCG(solver, ridge)
    return Ridge(solver, ridge) if ridge else solver


def _shifted(image: Sequence[Tensor], v: Sequence[Tensor], ridge: float) -> tuple[Tensor, ...]:
    return tuple(image) if ridge == 0.0 else tuple(torch._foreach_add(list(image), list(v), alpha=ridge))


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    parts = flat.split([s.numel() for s in shapes])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _norm_of(matvec: MatVec, start: Sequence[Tensor], iterations: int = 20) -> float:
    """Return a lower estimate of ||H|| by the power method, within a few percent after that many products."""
    v, norm = tuple(start), 0.0
    for _ in range(iterations):
        length = math.sqrt(float(inner(list(v), list(v))))
        if not (0.0 < length < math.inf):
            break
        v = tuple(matvec(tuple(t / length for t in v)))
        norm = math.sqrt(float(inner(list(v), list(v))))
    return norm
