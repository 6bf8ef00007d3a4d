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
from typing import final

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation.vectors import rounding, zeros_like
from ..policies.validation import count
from .krylov import Layout, Rows
from .solution import MatVec, Solution, SolverStatus
from .spectral_inverse import SpectralInverse
from .spectrum import Spectrum

__all__ = ["Lanczos"]


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
