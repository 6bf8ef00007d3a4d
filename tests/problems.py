"""Bilevel problems with known solutions, shared by the tests. Everything is float64 unless asked otherwise.

A `Problem` is two torch functions f(x, y) and g(x, y) of one tensor each, a start, and what is known in closed form:
y*(x), F(x) = f(x, y*(x)) and its gradient. `Problem.instance()` gives leaves and zero-argument closures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Level = Callable[[Tensor, Tensor], Tensor]


class Instance(NamedTuple):
    """Leaves and closures of a problem at one point."""

    x: Tensor
    y: Tensor
    upper: Callable[[], Tensor]
    lower: Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """A bilevel problem; ``solve`` is y*(x), None if it is not known in closed form."""

    name: str
    f: Level
    g: Level
    x0: Tensor
    y0: Tensor
    solve: Callable[[Tensor], Tensor] | None = None

    def ystar(self, x: Tensor) -> Tensor:
        """y*(x), by formula or by Newton's method with dense Hessians."""
        if self.solve is not None:
            return self.solve(x)
        y = self.y0.clone()
        for _ in range(50):
            hessian, gradient = self.hessian(x, y), self.gradient_y(x, y)
            y = y - torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(y.shape)
            if gradient.norm() < 1e-13:
                break
        return y

    def gradient_y(self, x: Tensor, y: Tensor) -> Tensor:
        """grad_y g."""
        return torch.func.grad(self.g, argnums=1)(x, y)

    def hessian(self, x: Tensor, y: Tensor) -> Tensor:
        """H as a dense matrix, d_y x d_y."""
        # Reverse over reverse: forward mode sets off a deprecation warning inside torch.
        rows = torch.func.jacrev(torch.func.grad(self.g, argnums=1), argnums=1)(x, y)
        return rows.reshape(y.numel(), y.numel())

    def cross(self, x: Tensor, y: Tensor) -> Tensor:
        """C = grad^2_xy g as a dense matrix, d_x x d_y."""
        block = torch.func.jacrev(torch.func.grad(self.g, argnums=0), argnums=1)(x, y)
        return block.reshape(x.numel(), y.numel())

    def hypergradient(self, x: Tensor, y: Tensor) -> Tensor:
        """h(x, y) = f_x - C H^{-1} f_y with a dense solve."""
        fx, fy = torch.func.grad(self.f, argnums=(0, 1))(x, y)
        v = torch.linalg.solve(self.hessian(x, y), fy.reshape(-1))
        return fx - (self.cross(x, y) @ v).reshape(x.shape)

    def F(self, x: Tensor) -> float:
        """f(x, y*(x))."""
        return float(self.f(x, self.ystar(x)))

    def dF(self, x: Tensor) -> Tensor:
        """The gradient of F."""
        return self.hypergradient(x, self.ystar(x))

    def instance(self, x: Tensor | None = None, y: Tensor | None = None, *, solved: bool = False) -> Instance:
        """Leaves at (x, y), by default (x0, y0), or (x, y*(x)) if ``solved``; and closures over them."""
        x = (self.x0 if x is None else x).detach().clone().requires_grad_()
        if solved:
            y = self.ystar(x.detach())
        y = (self.y0 if y is None else y).detach().clone().requires_grad_()
        return Instance(x, y, lambda: self.f(x, y), lambda: self.g(x, y))


@dataclass(frozen=True)
class Quadratic:
    """g = y'Hy/2 + x'Cy + b'y and f = y'Ay/2 + x'Bx/2 + x'Dy + p'y + q'x + const."""

    H: Tensor
    C: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    D: Tensor
    p: Tensor
    q: Tensor
    const: float = 0.0

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        own = 0.5 * y @ self.A @ y + 0.5 * x @ self.B @ x
        return own + x @ self.D @ y + self.p @ y + self.q @ x + self.const

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y @ self.H @ y + x @ self.C @ y + self.b @ y

    def ystar(self, x: Tensor) -> Tensor:
        return -torch.linalg.solve(self.H, self.C.T @ x + self.b)

    def ddF(self) -> Tensor:
        """The Hessian of F, which is quadratic."""
        J = -torch.linalg.solve(self.H, self.C.T)
        return self.B + self.D @ J + J.T @ self.D.T + J.T @ self.A @ J

    def xstar(self) -> Tensor:
        """The minimizer of F."""
        zero = torch.zeros(self.B.shape[0], dtype=self.B.dtype)
        return -torch.linalg.solve(self.ddF(), self.problem("", zero, self.b).dF(zero))

    def problem(self, name: str, x0: Tensor, y0: Tensor) -> Problem:
        return Problem(name, self.f, self.g, x0, y0, self.ystar)


def vector(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def quadratic(H, C, b, A, B, D, p, q, const=0.0) -> Quadratic:
    return Quadratic(vector(H), vector(C), vector(b), vector(A), vector(B), vector(D), vector(p), vector(q), const)


def b1_data() -> Quadratic:
    return quadratic([[2.0]], [[-1.0]], [0.0], [[1.0]], [[0.1]], [[0.0]], [-1.0], [0.0], 0.5)


def b1() -> Problem:
    """Scalar: g = y^2 - x y, f = (y-1)^2/2 + .05 x^2; y* = x/2, dF = .35 x - .5, x* = 10/7."""
    return b1_data().problem("b1", vector([4.0]), vector([0.0]))


def b1y() -> Problem:
    """As b1 with f = (y-1)^2/2 alone (the shape of data cleaning); x* = 2."""
    data = quadratic([[2.0]], [[-1.0]], [0.0], [[1.0]], [[0.0]], [[0.0]], [-1.0], [0.0], 0.5)
    return data.problem("b1y", vector([4.0]), vector([0.0]))


def b2_data() -> Quadratic:
    return quadratic(
        [[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 4.0]],
        [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]],
        [0.5, -1.0, 0.25],
        [[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.5, 0.0, 1.0]],
        [[0.5, 0.1], [0.1, 0.25]],
        [[0.0, 0.1, 0.2], [0.3, 0.0, 0.0]],
        [-1.0, 0.5, 0.0],
        [0.2, -0.1],
        3.0,
    )


def b2() -> Problem:
    """d_x = 2, d_y = 3; eigenvalues of H from .776 to 4.02."""
    return b2_data().problem("b2", vector([1.0, -0.5]), vector([0.2, 0.1, -0.3]))


def random_qb_data(seed: int, mu: float = 0.2, dy: int = 4, dx: int = 3) -> tuple[Quadratic, Tensor, Tensor]:
    """A random convex quadratic with its start (x0, y0); the numbers come from NumPy's generator."""
    import numpy as np

    rng = np.random.default_rng(seed)
    M = rng.normal(size=(dy, dy))
    H, C, b = M @ M.T / dy + mu * np.eye(dy), rng.normal(size=(dx, dy)), rng.normal(size=dy)
    p, q = rng.normal(size=dy), rng.normal(size=dx) * 0.1
    data = quadratic(H, C, b, np.eye(dy), 0.1 * np.eye(dx), np.zeros((dx, dy)), p, q, 10.0)
    return data, vector(rng.normal(size=dx) * 2), torch.zeros(dy, dtype=torch.float64)


def random_qb(seed: int, mu: float = 0.2, dy: int = 4, dx: int = 3) -> Problem:
    data, x0, y0 = random_qb_data(seed, mu, dy, dx)
    return data.problem(f"random_qb({seed})", x0, y0)


def ridge_hpo(seed: int = 0, n: int = 30, m: int = 20, d: int = 5, dtype: torch.dtype = torch.float64) -> Problem:
    """Ridge regression with one regularizer exp(x_j) per feature.

    g = |Xw - t|^2 / (2n) + sum_j exp(x_j) w_j^2 / 2 and f = |X_v w - t_v|^2 / (2m).
    """
    rng = torch.Generator().manual_seed(seed)
    X, Xv, w, e, ev = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((n, d), (m, d), (d,), (n,), (m,)))
    t, tv = X @ w + 0.5 * e, Xv @ w + 0.5 * ev
    X, Xv, t, tv = (a.to(dtype) for a in (X, Xv, t, tv))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (Xv @ y - tv).square().mean()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (X @ y - t).square().mean() + 0.5 * (x.exp() * y.square()).sum()

    def solve(x: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ X / n + torch.diag(x.exp()), X.T @ t / n)

    x0 = torch.linspace(-2.0, 0.5, d, dtype=dtype)
    return Problem("ridge_hpo", f, g, x0, torch.zeros(d, dtype=dtype), solve)


def softmax_toy(seed: int = 0, n: int = 24, m: int = 16, d: int = 3, classes: int = 3) -> Problem:
    """Data cleaning in small: x weighs the training samples, y is a softmax regression; f has no direct part.

    g = mean_i sigmoid(x_i) CE_i(y) + .05 |y|^2 and f = CE(y) on validation data. Not quadratic.
    """
    rng = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, d, generator=rng, dtype=torch.float64)
    labels = torch.arange(n) % classes
    held_out = torch.arange(m) % classes
    X = centers[labels] + torch.randn(n, d, generator=rng, dtype=torch.float64)
    Xv = centers[held_out] + torch.randn(m, d, generator=rng, dtype=torch.float64)
    noisy = torch.where(torch.rand(n, generator=rng) < 0.3, (labels + 1) % classes, labels)

    def cross_entropy(features: Tensor, targets: Tensor, y: Tensor) -> Tensor:
        logits = features @ y.reshape(d, classes)
        return torch.logsumexp(logits, 1) - logits.gather(1, targets[:, None])[:, 0]

    def f(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(Xv, held_out, y).mean()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(x) * cross_entropy(X, noisy, y)).mean() + 0.05 * y.square().sum()

    x0 = torch.linspace(-1.0, 1.0, n, dtype=torch.float64)
    return Problem("softmax_toy", f, g, x0, torch.zeros(d * classes, dtype=torch.float64))


PROBLEMS = (b1, b1y, b2, ridge_hpo, softmax_toy)
