"""What the tests of hypergradients share: golden numbers, estimates of the test problems, a small nonlinear model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.hypergradient import CG, Neumann, Oracle, Point, Sample, descend
from tests.problems import Problem

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
B2 = GOLDEN["B2_estimators"]
SAMPLE = Sample()
EXACT = CG(100, 1e-13)


def oracle_of(problem: Problem) -> Oracle:
    return Oracle(lambda x, y, _: problem.f(x[0], y[0]), lambda x, y, _: problem.g(x[0], y[0]))


def at(problem: Problem, *, solved: bool = True, x: Tensor | None = None) -> Point:
    x = problem.x0 if x is None else x
    return Point((x,), (problem.ystar(x) if solved else problem.y0,))


def estimate(estimator: Any, problem: Problem, point: Point | None = None, sample: Sample = SAMPLE) -> Tensor:
    point = at(problem) if point is None else point
    (h,) = estimator(oracle_of(problem), point, sample).hypergradient
    return h


def unrolled(estimator: Any, problem: Problem, steps: int, size: float, y: Tensor | None = None) -> Tensor:
    oracle, point = oracle_of(problem), at(problem, solved=False)
    start = point.y if y is None else (y,)
    end, path = descend(oracle, point.x, start, steps, size, SAMPLE)
    (h,) = estimator(oracle, point._replace(y=end, path=path), SAMPLE).hypergradient
    return h


def close(left: Tensor, right: Any, tolerance: float = 1e-9) -> bool:
    return bool(torch.allclose(left, torch.as_tensor(right), rtol=tolerance, atol=tolerance))


class Drawn:
    """`Neumann` with the number of factors given instead of drawn."""

    warm_start = False
    resamples = True

    def __init__(self, steps: int, scale: float, factors: int) -> None:
        self.solver, self.factors = Neumann(steps, scale, random=True), factors

    def solve(self, matvec, rhs, initial=None):
        object.__setattr__(self.solver, "_draw", lambda: self.factors)
        return self.solver.solve(matvec, rhs, initial)


def small_model():
    """A nonlinear model whose loss mixes three upper tensors with two lower ones, and leaves one of each out."""
    torch.manual_seed(1)
    x = [torch.randn(3, requires_grad=True), torch.randn((), requires_grad=True), torch.randn(2, requires_grad=True)]
    y = [torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(2, requires_grad=True)]
    data, target = torch.randn(5, 3), torch.randn(5, 4)

    def loss(x, y):
        fit = (torch.tanh((data * x[0]) @ y[0] + y[1]) - target).square().mean()
        return fit + x[1].exp() * sum((p**4).sum() for p in y[:2]) + y[2].square().sum()

    return x, y, loss
