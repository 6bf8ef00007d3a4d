"""Linear solvers with a formula for their result: the Neumann series, one random term of it, and the identity.

A solver is an approximation P of the inverse of the lower Hessian H, applied to one vector. The same one serves the
hypergradient, ``h = f_x - C P f_y``, and the response of the lower variable to a move d of the upper one,
``w = P C^T d``: the searched function then has the slope that the hypergradient promises.

| solver | P | Hessian-vector products |
|---|---|---|
| `Neumann` | ``scale * sum_{q=0}^{steps} (I - scale H)^q`` | ``steps``, and 3 for a scale of "auto" |
| `Neumann` with ``random=True`` | ``N scale prod_{j=1}^{n} (I - scale H_j)``, n from 0..N-1 | (N-1)/2 on average |
| `Identity` | ``scale * I`` | none |
| `CG`, in ``cg`` | conjugate gradients to a relative residual | until the tolerance, at most ``max_iterations`` |
| `Exact`, in ``exact`` | the inverse, by a dense solve | d_y |

Solvers hold options only. A vector is a sequence of tensors; its arithmetic is done in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies.validation import count, finite, positive

from ..evaluation.processes import first
from ..evaluation.vectors import add, cast_like, dot, rounding, scale, widen, zeros_like
from .krylov import Layout, Rows
from .solution import MatVec, Solution, SolverStatus, trivial_solution
from .spectrum import Spectrum

__all__ = ["Identity", "Neumann", "Probed"]

_PROBES = 3
"""Measured on five spectra with 100 eigenvalues, 50 right sides each: scale times the largest is .78 to 1.21. With 2 it
is up to 2.2; with 1, 150; with 3 and without r, 1.8."""


class Probed(NamedTuple):
    """What `Neumann.scaled` returns.

    Attributes:
        scale: The scale; None: none was found.
        products: Number of products that were taken.
        status: Why there is no scale.
    """

    scale: float | None
    products: int
    status: SolverStatus


@final
@dataclass(frozen=True)
class Neumann:
    """The truncated Neumann series of the inverse, or one random term of it.

    Sum: ``scale * sum_{q=0}^{steps} (I - scale H)^q b``, with ``steps`` products; relative error at most
    ``(1 - scale mu)^(steps + 1)``. From ``initial`` the series is applied to ``b - H initial``, for one product more.

    Random: ``N scale prod_{j=1}^{n} (I - scale H_j) b`` with N = steps and n uniform on 0..N-1; eq. (13) of Fan et al.
    (2023), arXiv 2305.18666, with the factor ``scale`` inside the product and the range of n corrected. Its expectation
    is the sum with ``steps = N - 1`` if each H_j is the Hessian on an independent sample. `implicit` therefore calls
    the lower closure for each product. The variance grows with N, so that the sum is the default.

    Args:
        steps: Number of products of the sum (0 or more), or N (1 or more).
        scale: 1 / L_g, above 0. The series converges below 2 / (largest eigenvalue of H); the step size of a lower loop
            of gradient descent that converges is a good choice. "auto": 1 / (|t| + r), with the largest Ritz value t of
            3 steps of Lanczos' method on b, and the residual r of that basis. This costs 3 more products, and memory
            for 4 vectors. `BiSLS` uses the scale of f_y for the response too, so that P is the same.
        random: Whether to draw one term in place of the sum.
        generator: Random generator of n; by default, torch's global one.

    Raises:
        OptionError: An option is outside its range.

    >>> import torch
    >>> H = torch.diag(torch.tensor([1.0, 2.0]))
    >>> solution = Neumann(steps=1, scale=0.5).solve(lambda v: (H @ v[0],), (torch.tensor([1.0, 1.0]),))
    >>> solution.tensors[0], solution.iterations
    (tensor([0.7500, 0.5000]), 1)
    """

    steps: int
    scale: float | Literal["auto"] = "auto"
    random: bool = False
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Validate the options."""
        count("Neumann", "steps", self.steps, least=1 if self.random else 0)
        if self.scale != "auto":
            positive("Neumann", "scale", self.scale)
            finite("Neumann", "scale", self.scale)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise OptionError(f"Neumann(generator={self.generator!r}): pass a torch.Generator, or None")

    @property
    def warm_start(self) -> bool:
        """False: the series does not use the previous solution."""
        return False

    @property
    def resamples(self) -> bool:
        """True for ``random``: the product is unbiased for independent samples only."""
        return self.random

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return the series applied to ``rhs``.

        If there is no curvature along b (``H b = 0``), the result is zero with the status ``flat``. If a term is longer
        than the one before it, the series ends before it with the status ``diverging``. The reported residual is the
        length of the last term, ``||(I - scale H)^steps b|| / ||b||``, an upper bound of the residual.

        Args:
            matvec: The product with H, or with an independent sample of it at every call.
            rhs: The right side b. If it is not finite, it is returned unchanged with the status ``non_finite``.
            initial: The first approximation, zero by default. It has no effect with ``random``.
        """
        b = widen(rhs)
        size = dot(b, b)
        if (ended := trivial_solution(rhs, size)) is not None:
            return ended
        probed = self.scaled(matvec, rhs)
        factor, offset, taken = probed.scale, None, probed.products
        if factor is None:
            return Solution(zeros_like(rhs), taken, 1.0, probed.status)
        if initial is not None and not self.random:
            offset, taken = widen(initial), taken + 1
            b = add(b, widen(matvec(cast_like(offset, rhs))), -1.0)
        draws = self._draw() if self.random else self.steps
        term, total, length = b, b, dot(b, b)
        status = SolverStatus.complete
        # A term at the rounding level of b may grow by rounding alone.
        slack, floor = 1.0 + 16 * rounding(b), rounding(b) ** 2 * size
        for number in range(draws):
            image = widen(matvec(cast_like(term, rhs)))
            taken += 1
            following = add(term, image, -factor)
            previous, length = length, dot(following, following)
            if not math.isfinite(length):
                status, length = SolverStatus.non_finite, previous
                break
            if number == 0 and offset is None and length == previous and not any(bool(t.any()) for t in image):
                return Solution(zeros_like(rhs), taken, 1.0, SolverStatus.flat)
            if length > previous * slack + floor:
                status, length = SolverStatus.diverging, previous
                break
            term, total = following, following if self.random else add(total, following)
        result = scale(total, factor * (self.steps if self.random else 1))
        if offset is not None:
            result = add(offset, result)
        residual = math.nan if self.random else math.sqrt(length / size)
        return Solution(cast_like(result, rhs), taken, residual, status)

    def scaled(self, matvec: MatVec, rhs: Sequence[Tensor]) -> Probed:
        """Return the scale as a number; "auto" takes products for it.

        Args:
            matvec: The product with H, as for `solve`.
            rhs: The right side b.
        """
        if self.scale != "auto":
            return Probed(self.scale, 0, SolverStatus.complete)
        layout = Layout(rhs)
        first = layout.flat(rhs)
        size = math.sqrt(float(layout.square(first)))
        if size == 0.0 or not math.isfinite(size):
            return Probed(None, 0, SolverStatus.zero_rhs if size == 0.0 else SolverStatus.non_finite)
        unit = 16.0 * rounding(rhs)
        columns, products, complete = Rows(layout, min(_PROBES, layout.size), None).grow(matvec, first, size, unit)
        if not complete:
            return Probed(None, products, SolverStatus.non_finite)
        spectrum = Spectrum.of(columns, _PROBES, unit)
        largest = float(spectrum.values.abs().max()) + spectrum.below
        if largest == 0.0:
            return Probed(None, products, SolverStatus.flat)
        return Probed(1.0 / largest, products, SolverStatus.complete)

    def _draw(self) -> int:
        device = "cpu" if self.generator is None else self.generator.device
        return first(int(torch.randint(0, self.steps, (), generator=self.generator, device=device)))


@final
@dataclass(frozen=True)
class Identity:
    """A multiple of the identity in place of the inverse Hessian: ``scale * b``, without products.

    With ``scale`` the lower step size, the hypergradient is that of one unrolled lower step (T1-T2, DARTS); with
    ``scale=1`` it is the "Identity" of Fan et al. (2023), arXiv 2305.18666.

    Args:
        scale: Factor, above 0.

    Raises:
        OptionError: ``scale`` is not a finite number above 0.

    >>> import torch
    >>> Identity(0.5).solve(lambda v: v, (torch.ones(2),)).tensors
    (tensor([0.5000, 0.5000]),)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Validate the options."""
        positive("Identity", "scale", self.scale)
        finite("Identity", "scale", self.scale)

    @property
    def warm_start(self) -> bool:
        """False: there are no iterations."""
        return False

    @property
    def resamples(self) -> bool:
        """False: there are no products."""
        return False

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return ``scale * rhs``; ``matvec`` and ``initial`` are not used."""
        b = widen(rhs)
        size = dot(b, b)
        if (ended := trivial_solution(rhs, size)) is not None:
            return ended
        return Solution(cast_like(scale(b, self.scale), rhs), 0, math.nan, SolverStatus.complete)
