"""The inverse of a small lower Hessian, as a linear solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .dense import columns, dense_solve, flat, shaped
from .solution import MatVec, Solution, SolverStatus

__all__ = ["Exact"]


@final
@dataclass(frozen=True)
class Exact:
    """The inverse itself: H column by column, by d_y products, and a dense solve. For small lower variables.

    >>> import torch
    >>> H = torch.diag(torch.tensor([1.0, 4.0]))
    >>> Exact().solve(lambda v: (H @ v[0],), (torch.tensor([1.0, 1.0]),)).tensors
    (tensor([1.0000, 0.2500]),)
    """

    @property
    def warm_start(self) -> bool:
        """There is nothing to start."""
        return False

    @property
    def resamples(self) -> bool:
        """All columns are those of one matrix."""
        return False

    def solve(self, matvec: MatVec, rhs: Sequence[Tensor], initial: Sequence[Tensor] | None = None) -> Solution:
        """Return H^{-1} rhs.

        Raises:
            SolverError: H is singular.
        """
        b = flat(rhs)
        if not bool(b.isfinite().all()):
            return Solution(tuple(t.detach().clone() for t in rhs), 0, float("nan"), SolverStatus.non_finite)
        H = columns(matvec, rhs)
        return Solution(shaped(dense_solve(H, b), rhs), b.numel(), 0.0, SolverStatus.converged)
