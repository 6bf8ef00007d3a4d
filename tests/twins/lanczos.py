"""The tangent with P from a Lanczos basis of f_y: P = V phi(T) V^T + c (I - V V^T)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import EPS
from .tangent import Lower, Tangent

__all__ = ["SpectralInverse", "SpectralTangent"]

K = 10


class SpectralInverse:
    """P, from at most K products with H along the Krylov space of b."""

    def __init__(self, H: Callable[[Tensor], Tensor], b: Tensor) -> None:
        self.H, vectors, exhausted = H, [b / b.norm()], False
        for _ in range(K):
            V = torch.stack(vectors, dim=1)
            image = H(vectors[-1])
            left = image - V @ (V.T @ image)
            left = left - V @ (V.T @ left)
            exhausted = float(left.norm()) <= 16 * EPS * float(image.norm()) or len(vectors) == len(b)
            if exhausted or len(vectors) == K:
                break
            vectors.append(left / left.norm())
        self.V = V = torch.stack(vectors, dim=1)
        T = torch.stack([V.T @ H(v) for v in vectors], dim=1)
        values, U = torch.linalg.eigh((T + T.T) / 2)
        largest = float(values.abs().max())
        self.horizon = K**2 / largest
        least = (16 * EPS) ** 0.5 * largest if exhausted else math.inf
        inverted = [1 / abs(t) if abs(t) > least else self.phi(t) for t in values.tolist()]
        self.inside = (U * torch.tensor(inverted, dtype=b.dtype)) @ U.T
        self.dual = V @ (self.inside @ (V.T @ b))

    def phi(self, t: float) -> float:
        return -math.expm1(-self.horizon * abs(t)) / abs(t) if t != 0 else self.horizon

    def apply(self, b: Tensor) -> Tensor:
        """Return P b; c is phi at the geometric mean of |<u, H u>| and ||H u||, u along the part of b outside of V."""
        inside = self.V.T @ b
        rest = b - self.V @ inside
        again = self.V.T @ rest
        inside, rest = inside + again, rest - self.V @ again
        w = self.V @ (self.inside @ inside)
        if float(rest.norm()) > 16 * EPS * float(b.norm()):
            u = rest / rest.norm()
            Hu = self.H(u)
            w = w + self.phi(math.sqrt(abs(float(u @ Hu)) * float(Hu.norm()))) * rest
        return w


class SpectralTangent(Tangent):
    """The tangent whose P is that of the hypergradient; what a linear lower gradient does along it is known."""

    def __init__(self, f_y: Tensor, lower: Lower, share: float, resumed: bool) -> None:
        super().__init__(f_y, lower, share, resumed)
        self.P, self.residual = SpectralInverse(lower.H, f_y), 0.0
        self.v = self.P.dual

    def along(self, d: Tensor, f_x: Tensor, refined: int = 0) -> float:
        self.d, push = d, self.lower.C_transposed(d)
        self.pushed, self.push = push, float(push.norm())
        self.w = self.P.apply(push)
        self.remainder = push - self.lower.H(self.w)
        return float(f_x @ d) - float(self.f_y @ self.w)

    def hypergradient(self, f_x: Tensor, refined: int) -> Tensor:
        return f_x - self.lower.C(self.v)

    def expected(self, a: float) -> Tensor:
        return self.lower.g_y.detach() - a * self.remainder
