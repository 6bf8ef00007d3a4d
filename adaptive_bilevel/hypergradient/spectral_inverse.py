"""An inverse from a basis of a Krylov space, for the right side that it was built from and for others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.vectors import Vector, zeros_like
from .krylov import Flat, Layout, Rows, on_host
from .solution import HessianReport, MatVec, Solution, SolverStatus
from .spectrum import Spectrum

__all__ = ["Extension", "SpectralInverse"]


class Extension(NamedTuple):
    """What `SpectralInverse.extend` returns for a right side b.

    Attributes:
        solution: ``w = P b``. Its status is ``zero_rhs`` for zeros; ``non_finite`` where b is not finite (then it is
            passed on), or the product is not (then the part of b outside of V is left out); otherwise the basis's.
        remainder: ``b - H w``, what the solution leaves undone, without a product of its own. With b = C^T d, a step a
            along (-d, w) changes the lower gradient by ``-a remainder`` to first order.
    """

    solution: Solution
    remainder: Vector


@final
class SpectralInverse:
    """The P of `Lanczos`, for the right side b of `Lanczos.basis` and for others.

    Args:
        k: Of the solver.
        layout: Of the vectors.
        rows: V^T.
        spectrum: Of H in V.
        size: ||b||.
        solution: P b.

    Attributes:
        solution: ``P b``; its status says what was found of H.
        spectrum: The Ritz values and what belongs to them: `smallest`, `largest` and `negative` are its facts.
        outside: c, that of the right side of the last `extend`; 0 before it.

    >>> import torch
    >>> from adaptive_bilevel.hypergradient import Lanczos
    >>> H = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    >>> inverse = Lanczos(3).basis(lambda v: (H @ v[0],), (torch.tensor([0.0, 2.0, 0.0]),))
    >>> w, _ = inverse.extend(lambda v: (H @ v[0],), (torch.tensor([0.0, 4.0, 1.0]),))
    >>> inverse.solution.tensors, w.tensors, w.iterations
    ((tensor([0.0000, 0.5000, 0.0000]),), (tensor([0.0000, 1.0000, 0.4944]),), 1)
    """

    def __init__(self, k: int, layout: Layout, rows: Rows, spectrum: Spectrum, size: float, solution: Solution) -> None:
        self._k, self._layout, self._rows, self._size = k, layout, rows, size
        self._inverse = spectrum.inverse()
        self.spectrum = spectrum
        self.solution = solution
        self.outside = 0.0

    def saved(self) -> dict[str, Any]:
        """Return what `restored` needs: numbers, and tensors of k + 1 vectors, which are shared."""
        rows = self._rows.stored(dropped=self.spectrum.below > 0.0)
        own = {"k": self._k, "rows": rows, "size": self._size, "residual": self.solution.residual}
        return {**own, **self.spectrum._asdict()}

    @classmethod
    def restored(cls, like: Sequence[Tensor], saved: Mapping[str, Any]) -> SpectralInverse | None:
        """Return the inverse from what `saved` has returned; None if ``like`` has other numbers of entries.

        Its `solution` has no tensors.
        """
        layout, rows = Layout(like), saved["rows"]
        if [block.shape[1] for block in rows] != [size for size, _, _ in layout.blocks]:
            return None
        spectrum = Spectrum(*(saved[name] for name in Spectrum._fields))
        first = Solution((), 0, saved["residual"], spectrum.status)
        kept = Rows(layout, len(spectrum.values), None, stored=rows)
        return cls(saved["k"], layout, kept, spectrum, saved["size"], first)

    @property
    def smallest(self) -> float:
        """The smallest Ritz value, NaN if there is none."""
        return float(self.spectrum.values[0]) if self._rows.count else math.nan

    @property
    def largest(self) -> float:
        """The largest Ritz value, NaN if there is none."""
        return float(self.spectrum.values[-1]) if self._rows.count else math.nan

    @property
    def negative(self) -> float:
        """The share of ``||b||^2`` that lies along negative curvature, in [0, 1]."""
        return self.spectrum.negative

    def report(self) -> HessianReport:
        """Return what the basis has shown of H."""
        first = self.solution
        horizon = self.spectrum.horizon if self.spectrum.below > 0.0 else math.inf
        return HessianReport(first.status, first.residual, self.smallest, self.largest, self.negative, horizon=horizon)

    def built_from(self, rhs: Sequence[Tensor]) -> bool:
        """Return whether ``rhs`` is the right side b up to rounding; False where b was zero or not finite."""
        if not self._rows.count or not self._layout.fits(rhs):
            return False
        change = foreach.sub(self._layout.flat(rhs), foreach.mul(self._rows.row(0), self._size))
        return math.sqrt(float(self._layout.square(change))) <= 16.0 * self._rows.unit * self._size

    def extend(self, matvec: MatVec, rhs: Sequence[Tensor]) -> Extension:
        """Return ``P rhs`` with c measured on the part of ``rhs`` outside of V: one product, or none if there is none.

        Args:
            matvec: The product with the same H.
            rhs: Another right side, of the same shapes.
        """
        b = self._layout.flat(rhs)
        inside, rest = self._rows.outside(b)
        within, beyond = torch.stack([inside.square().sum(), self._layout.square(rest).to(inside)]).tolist()
        size, length = math.sqrt(within + beyond), math.sqrt(beyond)
        if size == 0.0:
            return Extension(Solution(zeros_like(rhs), 0, 0.0, SolverStatus.zero_rhs), zeros_like(rhs))
        if not math.isfinite(size):
            passed, left = (tuple(t.detach().clone() for t in rhs) for _ in range(2))
            return Extension(Solution(passed, 0, math.nan, SolverStatus.non_finite), left)
        inside = on_host(inside)
        coefficients = self._inverse @ inside
        answer, image = self._rows.combine(coefficients), self._image(coefficients)
        status, products = self.solution.status, 0
        if length > self.spectrum.unit * size:
            direction = [block / length for block in rest]
            further = self._layout.flat(matvec(self._layout.shaped(direction)))
            products = 1
            curvature, squared = torch.stack(
                [self._layout.dot(direction, further), self._layout.square(further)]
            ).tolist()
            if math.isfinite(curvature) and math.isfinite(squared):
                self.outside = self._measured(curvature, math.sqrt(squared))
                if status in (SolverStatus.zero_rhs, SolverStatus.flat):  # these say something of the basis only
                    status = SolverStatus.complete if self.outside > 0.0 else SolverStatus.flat
                foreach.add_(answer, rest, alpha=self.outside)
                foreach.add_(image, further, alpha=self.outside * length)
            else:
                self.outside, status = 0.0, SolverStatus.non_finite
        remainder = foreach.sub(b, image)
        residual = math.sqrt(float(self._layout.square(remainder))) / size
        shaped = self._layout.shaped
        return Extension(Solution(shaped(answer), products, residual, status), shaped(remainder))

    def apply(self, rhs: Sequence[Tensor]) -> Vector:
        """Return ``P rhs`` with c as it is, without a product."""
        inside, rest = self._rows.outside(self._layout.flat(rhs))
        answer = self._rows.combine(self._inverse @ on_host(inside))
        foreach.add_(answer, rest, alpha=self.outside)
        return self._layout.shaped(answer)

    def _measured(self, curvature: float, norm: float) -> float:
        """Return c from <u, H u> and ||H u||."""
        spectrum = self.spectrum
        if math.isinf(spectrum.horizon) and norm > 0.0:
            spectrum = spectrum._replace(horizon=self._k**2 / norm)
        return spectrum.phi(math.sqrt(abs(curvature) * norm))

    def _image(self, coefficients: Tensor) -> Flat:
        """Return ``H V coefficients``."""
        image = self._rows.combine(self.spectrum.matrix() @ coefficients)
        if self.spectrum.below > 0.0:
            foreach.add_(image, self._rows.row(self._rows.count), alpha=self.spectrum.below * float(coefficients[-1]))
        return image
