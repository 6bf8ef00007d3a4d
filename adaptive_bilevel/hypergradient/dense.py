"""Vectors of tensors as dense vectors and matrices, for small variables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SolverError
from ..evaluation.vectors import Vector, widen
from .solution import MatVec

__all__ = ["columns", "dense_solve", "flat", "shaped"]


def columns(product: MatVec, like: Sequence[Tensor]) -> Tensor:
    """Return the dense matrix of a linear map of vectors shaped `like`, one product per column."""
    size = sum(t.numel() for t in like)
    basis = torch.eye(size, dtype=flat(like).dtype, device=like[0].device)
    return torch.stack([flat(product(shaped(e, like))) for e in basis], dim=1)


def dense_solve(H: Tensor, rhs: Tensor) -> Tensor:
    """Return H^{-1} rhs.

    Raises:
        SolverError: H is singular.
    """
    try:
        solved: Tensor = torch.linalg.solve(H, rhs)
    except RuntimeError as error:
        raise SolverError(
            "the lower Hessian is singular: the lower loss has no unique minimizer here. Add a ridge term to it, or "
            "use CG or Neumann"
        ) from error
    return solved


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector, in the widest dtype of the tensors and at least float32."""
    return torch.cat([t.reshape(-1) for t in widen(tensors)])


def shaped(vector: Tensor, like: Sequence[Tensor]) -> Vector:
    """Return a vector in the shapes and dtypes of the tensors."""
    parts = vector.split([t.numel() for t in like])
    return tuple(part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True))
