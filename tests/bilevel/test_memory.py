"""What an upper step holds: copies of x and of y beyond a loop with constant steps and the same hypergradient."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, assign, implicit
from live import live_bytes

LARGE, SMALL, ROWS = 30_000, 50, 2
SMALL_THINGS = 0.25  # of a copy: numbers, states of the random generator, and a byte per entry of x that is covered
SOLVER = CG(max_iterations=3, tolerance=0.0)


class Least:
    """Least squares with few rows at both levels, whose targets are drawn: the graphs hold little but gradients."""

    def __init__(self, upper: int, lower: int) -> None:
        torch.manual_seed(0)
        self.x, self.y = (torch.zeros(n, requires_grad=True) for n in (upper, lower))
        self.rows = [torch.randn(ROWS, p.numel()) / p.numel() ** 0.5 for p in (self.x, self.y, self.y)]

    def draw(self) -> None:
        self.targets = torch.randn(2, ROWS)

    def upper(self) -> Tensor:
        return ((self.rows[2] @ self.y - self.targets[0]) ** 2).sum() + 0.05 * self.x.dot(self.x)

    def lower(self) -> Tensor:
        residual = self.rows[1] @ self.y + self.rows[0] @ self.x - self.targets[1]
        return (residual**2).sum() + 0.05 * self.y.dot(self.y)


def plain(problem: Least, direction: str) -> Callable[[], Any]:
    inner = torch.optim.SGD([problem.y], lr=0.1)
    outer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[direction]([problem.x], lr=1e-2)

    def iterate() -> None:
        problem.draw()
        problem.y.grad = torch.autograd.grad(problem.lower(), problem.y)[0]
        inner.step()
        assign([problem.x], implicit(problem.upper, problem.lower, [problem.x], [problem.y], SOLVER))
        outer.step()

    return iterate


def searched(problem: Least, direction: str, **options: Any) -> Callable[[], Any]:
    inner: Any = SLS([problem.y])
    outer: Any = BiSLS([problem.x], lower=inner, direction=direction, solver=SOLVER, **options)

    def iterate() -> None:
        problem.draw()
        inner.step(problem.lower)
        assign([problem.x], implicit(problem.upper, problem.lower, [problem.x], [problem.y], SOLVER))
        outer.step(problem.upper)

    return iterate


def copies(iterate: Callable[[], Any], iterations: int = 12) -> tuple[float, float]:
    """The most that was held in some iterations, and what is held after them."""
    held = live_bytes(lambda: [iterate() for _ in range(iterations)])
    unit = LARGE * torch.get_default_dtype().itemsize
    return max(held) / unit, held[-1] / unit


@pytest.mark.parametrize(
    ("direction", "options", "upper", "lower", "both"),
    [
        # C^T d and the adjoint, while CG runs; x where the last searched step began, for the search's guard; two of
        # x and y, where the run would go back to; how y was moved along last.
        ("sgd", {"momentum": False}, 3, 5, 8),
        # Also the means of hypergradients and tangents, and the last hypergradient.
        ("sgd", {}, 5, 6, 11),
        # x before a kept step, and the tangent that y follows there with its direction.
        ("sgd", {"pace": "auto"}, 7, 7, 14),
        ("sgd", {"carry": False}, 5, 4, 9),  # no tangents
        # Also Adam's metric and the direction, while CG runs. Adam has a mean of its own.
        ("adam", {"momentum": False}, 3, 5, 9),
        ("adam", {}, 5, 6, 12),
        ("adam", {"pace": "auto"}, 7, 7, 15),
    ],
)
def test_the_peak_beyond_that_of_constant_steps(
    direction: str, options: dict[str, Any], upper: int, lower: int, both: int
) -> None:
    for most, sizes in ((upper, (LARGE, SMALL)), (lower, (SMALL, LARGE)), (both, (LARGE, LARGE))):
        theirs, _ = copies(plain(Least(*sizes), direction))
        ours, _ = copies(searched(Least(*sizes), direction, **options))
        assert ours - theirs <= most + SMALL_THINGS, sizes


def test_nothing_grows_over_200_iterations() -> None:
    peak, _ = copies(searched(Least(LARGE, LARGE), "adam"))
    iterate = searched(Least(LARGE, LARGE), "adam")
    gc.disable()  # nothing may be left to it
    try:
        later, held = copies(iterate, 200)
    finally:
        gc.enable()
    assert later <= peak + 0.01
    # Of x: the gradient, the one before and their mean, Adam's second moment, and where the last searched step began.
    # Of y: what the lower search goes back to, the mean of the tangents, and how y was moved along last. Of both, two
    # points that the run would go back to.
    assert held <= 12 + SMALL_THINGS
