"""The package's rules and their reference twins take the same 100 steps, from the same samples.

Where each level is one tensor, both do the same operations in the same order, and are compared exactly. Where one has
several tensors, the package sums inner products tensor by tensor, and a twin over one long vector: then parameters and
steps agree to 1e-9 as long as no decision of a search is closer than that. So those problems (`logistic`, `cleaning`)
are noisy and well conditioned: no run gets to where decreases are rounding errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS
from adaptive_bilevel.hypergradient import CG, Lanczos, assign, implicit

from .twins import Loss, bilevel, line_search, polyak
from .twins.lanczos import SpectralTangent

STEPS = 100
LOWER_STEPS = 2

pytestmark = pytest.mark.filterwarnings("ignore:(Bi|Auto)?S(LS|PS)")  # failed searches are part of the comparison

directions = pytest.mark.parametrize("direction", ["sgd", "adam"])


# ------------------------------------------------------------------------------------------------ single level


class Problem(NamedTuple):
    """A start, the sizes of the tensors that the package gets it in, and what draws a sample's loss."""

    x: Tensor
    sizes: list[int]
    draw: Callable[[], Loss]


def noisy_quadratic(seed: int, noise: float = 0.3, offset: float = 0.0) -> Problem:
    """f_i(x) = (x - b_i)' A (x - b_i) / 2 + offset, with eigenvalues of A from .2 to about 4."""
    rng = torch.Generator().manual_seed(seed)
    M, b, x = (torch.randn(*shape, generator=rng) for shape in ((8, 8), (8,), (8,)))
    A = M @ M.T / 8 + 0.2 * torch.eye(8)

    def draw() -> Loss:
        center = b + noise * torch.randn(8, generator=rng)
        return lambda x: 0.5 * (x - center) @ A @ (x - center) + offset

    return Problem(3 * x, [8], draw)


def quadratic(seed: int) -> Problem:
    """The same without noise, and with a minimum of 1: it is solved to the rounding of f."""
    return noisy_quadratic(seed, noise=0.0, offset=1.0)


class Points(NamedTuple):
    """Points of three classes."""

    features: Tensor
    labels: Tensor

    def batch(self, rng: torch.Generator, size: int, among: int) -> tuple[Tensor, Points]:
        chosen = torch.randperm(among, generator=rng)[:size]
        return chosen, Points(self.features[chosen], self.labels[chosen])

    def losses(self, w: Tensor) -> Tensor:
        """Return the cross-entropy of each point under a softmax regression with weights and biases in one row."""
        return cross_entropy(self.features @ w[:12].reshape(4, 3) + w[12:], self.labels, reduction="none")


def points(rng: torch.Generator, centers: Tensor, count: int, wrong: float) -> Points:
    """Return that many points around the centers, a part of them with a wrong label."""
    true = torch.randint(3, (count,), generator=rng)
    flipped = (true + 1) % 3
    labels = torch.where(torch.rand(count, generator=rng) < wrong, flipped, true)
    return Points(centers[true] + torch.randn(count, 4, generator=rng), labels)


def logistic(seed: int) -> Problem:
    """Softmax regression on minibatches of 20 out of 80 points; a matrix and a vector."""
    rng = torch.Generator().manual_seed(seed)
    data = points(rng, 2 * torch.randn(3, 4, generator=rng), 80, wrong=0.2)

    def draw() -> Loss:
        batch = data.batch(rng, 20, among=80)[1]
        return lambda w: batch.losses(w).mean()

    return Problem(torch.zeros(15), [12, 3], draw)


def lasso(seed: int) -> Problem:
    """Regression on minibatches; the first three samples have a kink at the start, where their searches fail."""
    rng = torch.Generator().manual_seed(seed)
    X, target = torch.randn(60, 4, generator=rng), torch.randn(60, generator=rng)
    factors = first_three(9.0, 0.1)

    def draw() -> Loss:
        chosen, factor = torch.randperm(60, generator=rng)[:10], next(factors)
        return lambda w: 0.5 * (X[chosen] @ w - target[chosen]).square().mean() + factor * w.abs().sum()

    return Problem(torch.zeros(4), [4], draw)


def first_three(early: float, late: float) -> Iterator[float]:
    return itertools.chain([early] * 3, itertools.repeat(late))


RULES: dict[str, tuple[Any, Any]] = {
    "SLS": (SLS, line_search.SLS),
    "SLSB": (SLSB, line_search.SLSB),
    "AutoSLS": (AutoSLS, line_search.AutoSLS),
    "SPSB": (SPSB, polyak.SPSB),
}


@pytest.mark.parametrize("rule", RULES)
@directions
@pytest.mark.parametrize("problem", [quadratic, noisy_quadratic, logistic, lasso], ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_single_level(rule: str, direction: str, problem: Callable[[int], Problem], seed: int) -> None:
    start, sizes, draw = problem(seed)
    params = leaves(start, sizes)
    fast, twin = (cls(x, direction=direction) for cls, x in zip(RULES[rule], (params, start), strict=True))
    for k in range(STEPS):
        loss = draw()
        fast.step(lambda: loss(torch.cat(params)))
        twin.step(loss)
        compare(k, (fast, params, twin))


# ------------------------------------------------------------------------------------------------ two levels


class Bilevel(NamedTuple):
    """As `Problem`, with two levels: the sizes are those of x and of y."""

    x: Tensor
    y: Tensor
    sizes: tuple[list[int], list[int]]
    draw_upper: Callable[[], bilevel.Function]
    draw_lower: Callable[[], bilevel.Function]


def hyper_quadratic(seed: int) -> Bilevel:
    """g = (y - Jx - b)' H (y - Jx - b) / 2 + 1 and f = |y - t|^2 / 2 + 1: solved to the rounding of f."""
    rng = torch.Generator().manual_seed(seed)
    M, J, b, t, x = (torch.randn(*shape, generator=rng) for shape in ((3, 3), (3, 8), (3,), (3,), (8,)))
    H = M @ M.T / 3 + 0.3 * torch.eye(3)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - t).square().sum() + 1

    def g(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - J @ x - b) @ H @ (y - J @ x - b) + 1

    return Bilevel(2 * x, torch.zeros(3), ([8], [3]), lambda: f, lambda: g)


def penalties(seed: int, error: Callable[[Tensor], Tensor] = lambda rest: 0.5 * rest.square()) -> Bilevel:
    """Regression on minibatches with a penalty exp(x_j) y_j^2 / 2 for each weight.

    The first three samples of f have a kink at the start, where their searches fail.
    """
    rng = torch.Generator().manual_seed(seed)
    X, w, noise = (torch.randn(*shape, generator=rng) for shape in ((80, 6), (6,), (80,)))
    target, start, factors = X @ w + noise, torch.linspace(-2, 1, 6), first_three(9.0, 0.0)

    def draw(first: int) -> Callable[[Tensor], Tensor]:
        chosen = first + torch.randperm(40, generator=rng)[:20]
        return lambda y: error(X[chosen] @ y - target[chosen]).mean()

    def draw_upper() -> bilevel.Function:
        loss, factor = draw(0), next(factors)
        return lambda x, y: loss(y) + 0.01 * x.square().sum() + factor * (x - start).abs().sum()

    def draw_lower() -> bilevel.Function:
        loss = draw(40)
        return lambda x, y: loss(y) + 0.5 * (x.exp() * y.square()).sum()

    return Bilevel(start, torch.zeros(6), ([6], [6]), draw_upper, draw_lower)


def absolute_errors(seed: int) -> Bilevel:
    """The same with kinks in g, where its gradient jumps."""
    return penalties(seed, torch.abs)


def saturating(seed: int) -> Bilevel:
    """g = |y + B s(x)|^2 / 2, s a sigmoid with a jump: far away, half of a step changes its gradient as much."""
    rng = torch.Generator().manual_seed(seed)
    B = torch.randn(4, 3, generator=rng)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return softplus(10 - x).sum() + 0.01 * y.square().sum()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y + B @ (torch.sigmoid(x) + 0.1 * (x > -3.9))).square().sum()

    return Bilevel(torch.full((3,), -4.0), torch.zeros(4), ([3], [4]), lambda: f, lambda: g)


def cleaning(seed: int) -> Bilevel:
    """Data cleaning on minibatches: x weighs 60 points, y is a softmax regression.

    The first two samples have all points, later ones 20 of the first 40. A small penalty keeps x finite; f has it for
    the points of the last lower sample only.
    """
    rng = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(3, 4, generator=rng)
    training, validation = points(rng, centers, 60, wrong=0.4), points(rng, centers, 40, wrong=0.0)
    sizes = itertools.chain([(60, 60)] * 2, itertools.repeat((20, 40)))
    known = torch.arange(0)

    def draw_upper() -> bilevel.Function:
        batch, weighed = validation.batch(rng, 20, among=40)[1], known
        return lambda x, y: batch.losses(y).mean() + 0.01 * x[weighed].square().mean()

    def draw_lower() -> bilevel.Function:
        nonlocal known
        chosen, batch = training.batch(rng, *next(sizes))
        known = chosen
        return lambda x, y: (torch.sigmoid(x[chosen]) * batch.losses(y)).mean() + 0.05 * y.square().sum()

    return Bilevel(torch.full((60,), -5.0), torch.zeros(15), ([60], [12, 3]), draw_upper, draw_lower)


def episodes(seed: int) -> Bilevel:
    """y follows x, and f is of one noisy equation at a time, which each step can solve."""
    generator = torch.Generator().manual_seed(seed)

    def draw_upper() -> bilevel.Function:
        row, noise = (torch.randn(n, generator=generator) for n in (4, 1))
        return lambda x, y: 0.5 * (y @ row - 2 * noise).square().sum() + 0.1

    return Bilevel(
        torch.zeros(4),
        torch.zeros(4),
        ([3, 1], [3, 1]),
        draw_upper,
        lambda: lambda x, y: 0.5 * (y - x).square().sum() + 0.1,
    )


class SpectralBiSLS(bilevel.BiSLS):
    tangent = SpectralTangent
    shared = True


PAIRS: dict[str, tuple[Any, Any, Any, Any]] = {
    "BiSPS-SPSB": (BiSPS, SPSB, bilevel.BiSPS, polyak.SPSB),
    "BiSLS-SLS": (BiSLS, SLS, bilevel.BiSLS, line_search.SLS),
    "BiSLS-SLS-Lanczos": (BiSLS, SLS, SpectralBiSLS, line_search.SLS),
}

CASES: list[tuple[str, Callable[[int], Bilevel], int, float | None]] = [
    ("BiSPS-SPSB", hyper_quadratic, 1, None),
    ("BiSPS-SPSB", penalties, 1, None),
    ("BiSPS-SPSB", cleaning, 1, None),
    ("BiSLS-SLS", hyper_quadratic, 1, None),
    ("BiSLS-SLS", hyper_quadratic, 2, 1e-3),
    ("BiSLS-SLS", penalties, 1, None),
    ("BiSLS-SLS", penalties, 2, 1e-17),
    ("BiSLS-SLS", absolute_errors, 1, None),
    ("BiSLS-SLS", saturating, 1, None),
    ("BiSLS-SLS", cleaning, 1, None),
    ("BiSLS-SLS", cleaning, 2, None),
    ("BiSLS-SLS", episodes, 4, None),
    ("BiSLS-SLS", episodes, 2, None),
]
CASES += [("BiSLS-SLS-Lanczos", p, seed, lr) for rule, p, seed, lr in CASES if rule == "BiSLS-SLS" and lr != 1e-3]
"""The rules of both levels, problem, seed, and the first trial of the upper level if it is given."""


@pytest.mark.parametrize("rule, problem, seed, lr", CASES, ids=lambda part: getattr(part, "__name__", str(part)))
@directions
def test_two_levels(rule: str, problem: Callable[[int], Bilevel], seed: int, lr: float | None, direction: str) -> None:
    x, y, sizes, draw_upper, draw_lower = problem(seed)
    upper, lower = leaves(x, sizes[0]), leaves(y, sizes[1])
    outer_cls, inner_cls, outer_twin, inner_twin = PAIRS[rule]
    inner = inner_cls(lower)
    tangent = getattr(outer_twin, "tangent", None)
    solver = Lanczos() if tangent is SpectralTangent else CG()
    searched: dict[str, Any] = {} if tangent is None else {"solver": solver, "pace": "auto"}
    outer = outer_cls(upper, lr=lr, lower=inner, direction=direction, **searched)
    twin = outer_twin(x, inner_twin(y), direction, *([] if lr is None else [lr]))
    twin.sizes = sizes[0]
    tolerance = 1e-6 if tangent is SpectralTangent else None
    # A Krylov space that is almost exhausted multiplies rounding, in `cleaning` by 1e8 within ten steps.
    few: dict[Any, int] = {cleaning: 6, hyper_quadratic: 60} if tangent is SpectralTangent else {}
    # Solved after 70 steps; then what steps promise is below the rounding of f, which decides.
    steps = few.get(problem, STEPS if lr is None else 70)
    for k in range(steps):
        for _ in range(LOWER_STEPS):
            g = draw_lower()
            inner.step(at(g, upper, lower))
            twin.lower.step(lambda y: g(twin.x, y))
            compare(k, (inner, lower, twin.lower), tolerance=tolerance)
        f = draw_upper()
        h = bilevel.hypergradient(f, g, twin.x, twin.lower.x, tangent)
        assign(upper, implicit(at(f, upper, lower), at(g, upper, lower), upper, lower, solver))
        outer.step(at(f, upper, lower))
        twin.step(f, g, h)
        compare(k, (outer, upper, twin), (inner, lower, twin.lower), tolerance=tolerance)


# ------------------------------------------------------------------------------------------------ parts


def leaves(start: Tensor, sizes: list[int]) -> list[Tensor]:
    return [part.clone().requires_grad_() for part in start.split(sizes)]


def at(function: bilevel.Function, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> Callable[[], Tensor]:
    return lambda: function(torch.cat(list(upper)), torch.cat(list(lower)))


def compare(k: int, *levels: tuple[Any, list[Tensor], Any], tolerance: float | None = None) -> None:
    """Compare the parameters and the last steps of each level, by default exactly if all levels are one tensor."""
    rtol, atol = (0.0, 0.0) if all(len(params) == 1 for _, params, _ in levels) else (1e-9, 1e-12)
    if tolerance is not None:
        rtol, atol = tolerance, 1e-3 * tolerance
    for fast, params, twin in levels:
        x, step = torch.cat(params), fast.param_groups[0]["step_size"]
        if not torch.equal(x, twin.x) or step != twin.step_size:
            torch.testing.assert_close(x.detach(), twin.x, rtol=rtol, atol=atol, msg=lambda text: f"step {k}: {text}")
            assert step == pytest.approx(twin.step_size, rel=rtol, abs=0.0), f"step {k}"
