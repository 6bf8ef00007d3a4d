"""What a Krylov space shows of a symmetric matrix, and a positive function of it that stands in for the inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .solution import SolverStatus

__all__ = ["Spectrum"]

ASYMMETRIC = 0.01
"""Products whose matrix differs from its transpose by this part of its norm are not those of one symmetric matrix."""


class Spectrum(NamedTuple):
    """The Ritz values and vectors of H in a Krylov space, in double precision on the host.

    Attributes:
        values: The Ritz values t, ascending: the eigenvalues of T = V^T H V.
        vectors: The eigenvectors of T, as columns.
        below: ``||H V - V T||``, 0 where the Krylov space is exhausted.
        horizon: tau = k^2 / max |t|, infinite where no curvature was seen.
        asymmetry: ``||T - T^T|| / ||T||`` before T was made symmetric.
        unit: What counts as rounding, relative to max |t|.
    """

    values: Tensor
    vectors: Tensor
    below: float
    horizon: float
    asymmetry: float
    unit: float

    @classmethod
    def of(cls, columns: Sequence[Sequence[float]], k: int, unit: float) -> Spectrum:
        """Return the spectrum from the columns of V^T H V, each with the norm of what is left below it."""
        m = len(columns)
        full = torch.zeros(m + 1, m, dtype=torch.float64)
        for j, column in enumerate(columns):
            full[: j + 2, j] = torch.tensor(column, dtype=torch.float64)
        T = full[:m]
        norm = float(T.norm())
        values, vectors = torch.linalg.eigh((T + T.T) / 2)
        largest = float(values.abs().max()) if norm > 0.0 else 0.0
        asymmetry = float((T - T.T).norm()) / norm if norm > 0.0 else 0.0
        horizon = k**2 / largest if largest > 0.0 else math.inf
        return cls(values, vectors, float(full[m, -1]) if m else 0.0, horizon, asymmetry, unit)

    def phi(self, curvature: float) -> float:
        """Return (1 - exp(-tau |t|)) / |t| at a curvature t; 0 where no curvature was seen, for want of a horizon."""
        if math.isinf(self.horizon):
            return 0.0
        size = abs(curvature)
        return -math.expm1(-self.horizon * size) / size if size > 0.0 else self.horizon

    def inverse(self) -> Tensor:
        """Return phi(T); in an exhausted Krylov space, the inverse for all eigenvalues that are above rounding."""
        values: list[float] = self.values.tolist()
        least = math.sqrt(self.unit) * max(map(abs, values), default=0.0) if self.below == 0.0 else math.inf
        filtered = [1.0 / abs(t) if abs(t) > least else self.phi(t) for t in values]
        return (self.vectors * torch.tensor(filtered, dtype=torch.float64)) @ self.vectors.T

    def matrix(self) -> Tensor:
        """Return T."""
        return (self.vectors * self.values) @ self.vectors.T

    def residual(self, coefficients: Tensor) -> float:
        """Return ``||v_1 - H V coefficients||``, v_1 being the first column of V."""
        left = self.matrix() @ coefficients
        left[0] -= 1.0
        return math.hypot(float(left.norm()), self.below * float(coefficients[-1]))

    @property
    def negative(self) -> float:
        """The share of v_1, squared, that lies along negative curvature."""
        if math.isinf(self.horizon):
            return 0.0
        negative = self.values < -self.unit * self.values.abs().max()
        return float(self.vectors[0, negative].square().sum())

    @property
    def status(self) -> SolverStatus:
        """What a user of an inverse of H should know of H."""
        if math.isinf(self.horizon):
            return SolverStatus.flat
        if self.asymmetry > max(ASYMMETRIC, self.unit):
            return SolverStatus.asymmetric
        size = self.values.abs()
        if float(self.values[0]) < -self.unit * float(size.max()):
            return SolverStatus.indefinite
        if float(size.min()) * self.horizon < 1.0:
            return SolverStatus.singular
        return SolverStatus.converged if self.below == 0.0 else SolverStatus.complete
