"""One inverse for hypergradient and response, also for an indefinite or singular lower Hessian H.

k steps of Lanczos' method on (H, f_y) give V, whose columns are an orthonormal basis of the Krylov space, and
T = V^T H V, whose eigenvalues t are the Ritz values. The inverse is

    P      = V phi(T) V^T + c (I - V V^T)            symmetric and positive definite, whatever H is
    phi(t) = (1 - exp(-tau |t|)) / |t|               1/t where k steps resolve it, |t| for negative curvature, and at
                                                     most tau for flat directions
    tau    = k^2 / max |t|                           k^2 is about the condition number that k steps of CG resolve
    c      = phi(sqrt(|<u, H u>| ||H u||))           u being the unit vector along the part of another right side that
                                                     is outside of V

phi(t) is the effect of gradient flow of duration tau on an eigenvector. The hypergradient's ``v = P f_y`` takes k
products; the response's ``w = P C^T d`` takes one more, H u. Because v is in the span of V, the slope of the searched
function, ``<f_x, d> - <f_y, w>``, is that of the hypergradient for any c.

Why not c = 1 / <u, H u>: positive and negative curvature of a network cancel in it, w is far too long, and the first
searches are cut to steps of 1e-5, from which later ones do not recover. 1 / ||H u|| is too short where H is definite.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation import foreach
from ..evaluation.vectors import Vector, rounding, zeros_like
from ..policies.validation import count
from .krylov import Flat, Layout, Rows, on_host
from .solution import HessianReport, MatVec, Solution, SolverStatus
from .spectrum import Spectrum

__all__ = ["Extension", "Lanczos", "SpectralInverse"]


@final
@dataclass(frozen=True)
class Lanczos:
    """An inverse from the spectrum of H that k products resolve. It is symmetric and positive definite for every H.

    If H is positive definite and k iterations of `CG` resolve it, the solution is close to that of `CG`. If H is
    indefinite (a network) or singular (a sample with fewer rows than y has entries), the solution is bounded. If there
    is no curvature along the right side (a lower loss that is linear in y), it is zero. The docstring of the module has
    the formulas.

    `solve` is that of any linear solver. `basis` returns the inverse; each further right side costs one product.

    The cost is k products, or fewer if the Krylov space is exhausted. The memory is k + 1 vectors of the size of y,
    on its device or on another one.

    Args:
        k: Maximal number of products, at least 1.
        dtype: Dtype of the k vectors. ``torch.bfloat16`` halves the memory of float32. If None, the dtype of y, and at
            least float32.
        device: Where the k vectors are kept, and projected on. ``"cpu"`` leaves an accelerator's memory to the model;
            each product then sends one vector there and one back. If None, the device of y.

    Raises:
        OptionError: An option is outside its range.

    >>> import torch
    >>> H = torch.diag(torch.tensor([1.0, 4.0, -2.0]))
    >>> solution = Lanczos().solve(lambda v: (H @ v[0],), (torch.ones(3),))
    >>> solution.tensors[0], solution.iterations, solution.status.name
    (tensor([1.0000, 0.2500, 0.5000]), 3, 'indefinite')
    """

    k: int = 10
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        count("Lanczos", "k", self.k)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise OptionError(f"Lanczos(dtype={self.dtype!r}): pass a floating dtype such as torch.bfloat16, or None")
        object.__setattr__(self, "device", _device(self.device))

    @property
    def warm_start(self) -> bool:
        """False: P belongs to one point, so that earlier solutions do not help."""
        return False

    @property
    def resamples(self) -> bool:
        """False: the method needs the same matrix in each product."""
        return False

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return ``P rhs``.

        Args:
            matvec: The product with H, symmetric.
            rhs: The right side b. If it is not finite, it is returned unchanged with the status ``non_finite``.
            initial: Without effect, since P would not be symmetric.
        """
        return self.basis(matvec, rhs).solution

    def basis(self, matvec: MatVec, rhs: Sequence[Tensor]) -> SpectralInverse:
        """Return the inverse P that the Krylov space of ``rhs`` gives.

        Args:
            matvec: The product with H, symmetric. One that is not finite ends the basis before it.
            rhs: The right side b.
        """
        layout, unit = Layout(rhs), 16.0 * rounding(rhs)
        following = layout.flat(rhs)
        size = length = math.sqrt(float(layout.square(following)))
        finite = math.isfinite(size)
        rows = Rows(layout, min(self.k, layout.size) if finite and size > 0.0 else 0, self.dtype, self.device)
        columns, products, finite = rows.grow(matvec, following, length, unit) if finite else ([], 0, False)
        spectrum = Spectrum.of(columns, self.k, unit)
        if not math.isfinite(size):
            first = Solution(tuple(t.detach().clone() for t in rhs), 0, math.nan, SolverStatus.non_finite)
        elif not columns:
            status = SolverStatus.zero_rhs if size == 0.0 else SolverStatus.non_finite
            first = Solution(zeros_like(rhs), products, float(size > 0.0), status)
        else:
            coefficients = spectrum.inverse()[:, 0]
            first = Solution(
                layout.shaped(rows.combine(size * coefficients)),
                products,
                spectrum.residual(coefficients),
                spectrum.status if finite else SolverStatus.non_finite,
            )
        return SpectralInverse(self.k, layout, rows, spectrum, size, first)


def _device(device: object) -> str | None:
    """Return an option that names a device as plain text."""
    if device is None:
        return None
    with contextlib.suppress(RuntimeError):  # a word that is no device
        if isinstance(device, (str, torch.device)) and torch.device(device).type != "meta":
            return str(torch.device(device))
    raise OptionError(f"Lanczos(device={device!r}): pass a device that keeps numbers, such as 'cpu', or None")


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
        return HessianReport(first.status, first.residual, self.smallest, self.largest, self.negative)

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
        coefficients = self._inverse @ on_host(inside)
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
