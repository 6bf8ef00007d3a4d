"""Conjugate gradients, and the same inverse applied to a second right side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation import foreach
from ..evaluation.reductions import agree
from ..evaluation.vectors import Vector, add, cast_like, dot, inner, inners, rounding, widen, zeros_like
from ..policies.validation import count, non_negative
from .solution import MatVec, Solution, SolverStatus, trivial_solution

__all__ = ["CG", "Adjoint", "dual_correction"]


@final
class Adjoint:
    """P b for a second right side b, from the products of a CG solve.

    After k iterations from zero, CG's iterate is P b with P = sum_i p_i p_i^T / <p_i, H p_i> over its directions,
    which does not depend on b once they are there. So the same P applied to another b takes no product of its own. For
    b = f_y, v = P f_y: the slope <f_x, d> - <f_y, P C^T d> of a response is then exactly that of the hypergradient
    f_x - C v. Galerkin orthogonality, <v, C^T d - H w> = 0, keeps what the solve has left undone out of `correction`.

    Args:
        functional: b.

    Attributes:
        tensors: v.
    """

    def __init__(self, functional: Sequence[Tensor]) -> None:
        self._functional = list(widen(functional))
        self.tensors = foreach.mul(self._functional, 0.0)

    def observe(self, p: Sequence[Tensor], image: Sequence[Tensor]) -> tuple[float, float]:
        """Look at a direction of the solve; `take` follows if the solve takes it.

        Args:
            p: The direction.
            image: H p.

        Returns:
            <p, H p> and ||H p||^2, read from the device together with what `take` needs.
        """
        pairs = (p, image), (image, image), (p, self._functional), (image, self.tensors)
        curvature, square, value, known = inners(*pairs)
        numbers = torch.stack([curvature, square, value - known]).tolist()
        self._length = numbers[2] / numbers[0] if numbers[0] > 0.0 and math.isfinite(numbers[0]) else 0.0
        return numbers[0], numbers[1]

    def take(self, p: Sequence[Tensor]) -> None:
        """Project v on the direction that was observed last; one without positive curvature is left out."""
        foreach.add_(self.tensors, p, alpha=self._length)

    def correction(self, moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
        """Return -<v, delta>, what phi is to be corrected by.

        Args:
            moved: The lower gradient at the candidate.
            gradient: The lower gradient at (x, y).
        """
        return dual_correction(self.tensors, moved, gradient)


def dual_correction(v: Sequence[Tensor], moved: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
    """Return -<v, moved - gradient> with v = P f_y: what a change of the lower gradient means for f, to first order."""
    delta = foreach.sub(moved, gradient)
    return -float(agree(inner(v, delta))[0])


@final
@dataclass(frozen=True)
class CG:
    """Conjugate gradients, the solver of AID-BiO and one of those in Fan et al. (2023), arXiv 2305.18666.

    The method iterates until ``||b - H v|| <= tolerance ||b||``. The error in the norm of H is at most
    ``2 ((sqrt(k) - 1) / (sqrt(k) + 1))^Q`` times the first one after Q iterations, k being the condition number of H.
    The returned iterate is the one after the last update.

    Three kinds of directions p end a solve, with L the largest ``||H p|| / ||p||`` seen:

    * ``negative_curvature``: ``<p, H p> < 0`` beyond rounding. H is indefinite.
    * ``vanishing_curvature``: ``<p, H p> / ||p||^2`` is rounding beside L; or it is below ``L / max_iterations^2``,
      what as many iterations resolve (of more entries than that), and the step along p would leave a residual longer
      than b. H is singular, or nearly.
    * ``flat``: ``H p = 0`` and L = 0. The lower loss is linear in y.

    The iterate with the smallest residual is then returned. It is zero if the first direction has no positive
    curvature: the hypergradient is then f_x, and there is no response. (Later iterates are nearer in the norm of H, but
    up to 300 times as long as those of the inverse of ``|H|``.) `Lanczos` uses such directions and does not stop there.

    Memory: 4 vectors of the size of y, and one more while an earlier iterate has the smallest residual.

    To solve further, use ``dataclasses.replace(solver, tolerance=solver.tolerance / 10)`` with the ``tensors`` of the
    solution as ``initial``.

    Args:
        max_iterations: Maximal number of iterations, at least 1. Each costs one product; ``initial`` costs one more.
        tolerance: Relative residual to reach, in [0, 1), and at least the rounding unit of the dtype.
        warm_start: Whether the caller should pass the previous solution as ``initial``. `implicit` does so.

    Raises:
        OptionError: An option is outside its range.

    >>> import torch
    >>> H = torch.diag(torch.tensor([1.0, 4.0]))
    >>> solution = CG(tolerance=1e-6).solve(lambda v: (H @ v[0],), (torch.tensor([1.0, 1.0]),))
    >>> solution.tensors[0], solution.iterations, solution.status.name
    (tensor([1.0000, 0.2500]), 2, 'converged')
    """

    max_iterations: int = 20
    tolerance: float = 0.1
    warm_start: bool = False

    def __post_init__(self) -> None:
        """Validate the options."""
        count("CG", "max_iterations", self.max_iterations)
        non_negative("CG", "tolerance", self.tolerance)
        if self.tolerance >= 1:
            raise OptionError(f"CG(tolerance={self.tolerance!r}): tolerance is a relative residual, pass less than 1")

    @property
    def resamples(self) -> bool:
        """False: CG needs the same matrix in each product."""
        return False

    def solve(
        self,
        matvec: MatVec,
        rhs: Sequence[Tensor],
        initial: Sequence[Tensor] | None = None,
        *,
        adjoint: Adjoint | None = None,
    ) -> Solution:
        """Return v with ``||rhs - H v|| <= tolerance ||rhs||``, or the iterate with the smallest residual.

        Args:
            matvec: The product with H, symmetric and positive definite.
            rhs: The right side b. If it is not finite, it is returned unchanged with the status ``non_finite``.
            initial: The first iterate, zero by default. Zero replaces it if it is better in the norm of H.
            adjoint: A second right side, which uses the same products.
        """
        product = _in_float32(matvec, rhs)
        b = widen(rhs)
        size = dot(b, b)
        if (ended := trivial_solution(rhs, size)) is not None:
            return ended
        v, residual, taken = zeros_like(b), b, 0
        start: Vector | None = None
        if initial is not None:
            start, taken = widen(initial), 1
            image = product(start)
            curvature, _ = _measured(start, image) if adjoint is None else adjoint.observe(start, image)
            if adjoint is not None:
                adjoint.take(start)
            # <v, Hv> / 2 - <b, v> is the squared distance in the norm of H, up to a constant that zero attains at 0.
            # The residual would be the wrong judge: it may grow while the iterate improves.
            if 0.5 * curvature - dot(b, start) < 0:
                v, residual = start, add(b, image, -1.0)
        unit = rounding(b)
        target = max(self.tolerance, unit) ** 2 * size
        p, square, norm = residual, size if residual is b else dot(residual, residual), 0.0
        length = square  # ||p||^2, by recurrence: the residual is orthogonal to the last p
        # As many iterations as y has entries resolve every curvature.
        resolved = self.max_iterations**-2 if sum(t.numel() for t in b) > self.max_iterations else 0.0
        status = SolverStatus.converged
        iteration = 0
        least = math.inf if start is None or v is not start else square  # any iterate is better than no answer
        best: Vector | None = None  # where that is not v; then with its adjoint
        dual: list[Tensor] = []
        while square > target:
            if iteration == self.max_iterations:
                status = SolverStatus.iteration_limit
                break
            image = product(p)
            iteration, taken = iteration + 1, taken + 1
            curvature, stretched = _measured(p, image) if adjoint is None else adjoint.observe(p, image)
            norm = max(norm, math.sqrt(stretched / length))
            if not math.isfinite(curvature) or not math.isfinite(norm):
                status = SolverStatus.non_finite
                break
            # Below unit * ||H|| ||p||^2 the sign of the curvature is rounding, and dividing by it would throw v far
            # away.
            if curvature <= unit * norm * length:
                status = _ended(curvature, unit * norm * length)
                break
            step = square / curvature
            shorter = tuple(foreach.add(residual, image, alpha=-step))
            following = dot(shorter, shorter)
            if not math.isfinite(following):
                status = SolverStatus.non_finite
                break
            if iteration > 1 and curvature < resolved * norm * length and following > size:
                status = SolverStatus.vanishing_curvature
                break
            if following < least:
                least, best, dual = following, None, []
            elif best is None:
                best, dual = v, [] if adjoint is None else [tensor.clone() for tensor in adjoint.tensors]
            v, residual = tuple(foreach.add(v, p, alpha=step)), shorter
            if adjoint is not None:
                adjoint.take(p)
            ratio = following / square
            p = tuple(foreach.add(shorter, p, alpha=ratio))
            length, square = following + ratio**2 * length, following
        if status.ended_by_curvature and best is not None:
            v, square = best, least
            if adjoint is not None:
                adjoint.tensors = dual
        if v is start:
            v = tuple(tensor.clone() for tensor in v)
        return Solution(cast_like(v, rhs), taken, math.sqrt(square / size), status)


def _ended(curvature: float, rounding: float) -> SolverStatus:
    """Return what a curvature that is not positive says."""
    if rounding == 0.0:
        return SolverStatus.flat
    return SolverStatus.negative_curvature if curvature < -rounding else SolverStatus.vanishing_curvature


def _measured(p: Sequence[Tensor], image: Sequence[Tensor]) -> tuple[float, float]:
    """Return <p, H p> and ||H p||^2 by one read."""
    curvature, square = torch.stack(inners((p, image), (image, image))).tolist()
    return curvature, square


def _in_float32(matvec: MatVec, like: Sequence[Tensor]) -> MatVec:
    """Return the product on vectors of at least float32, where the lower variable is shorter."""
    if all(t.dtype not in (torch.float16, torch.bfloat16) for t in like):
        return matvec
    return lambda v: widen(matvec(cast_like(v, like)))
