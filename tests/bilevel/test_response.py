"""How y answers: along the tangent of its solution, of one lower problem or of several that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS
from adaptive_bilevel.bilevel import LowerProblem
from adaptive_bilevel.bilevel.inverse import IterativeInverse, certified, refined
from adaptive_bilevel.errors import LowerLevelError
from adaptive_bilevel.evaluation.guard import Guard
from adaptive_bilevel.hypergradient import CG, Identity, Neumann

EXACT = CG(max_iterations=50, tolerance=0.0)


class Level:
    """Lower problems that are given as they are; predictions are dropped."""

    follows = False

    def __init__(self, problems: Sequence[LowerProblem]) -> None:
        self._problems = list(problems)

    def tensors(self) -> list[Tensor]:
        return [p for problem in self._problems for p in problem.tensors]

    def problems(self, closures: Any, guard: Guard) -> list[LowerProblem]:
        return self._problems

    def upper_moved(self) -> None: ...

    limit = None

    def restart(self) -> None: ...

    def carry(self, response: Sequence[Tensor], step: float) -> None: ...

    def follow(self, response: Sequence[Tensor], step: float) -> None: ...


class Graph:
    """y = y*(x), z = z*(x, y) and f(z): quadratic problems, of which the second depends on the first."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        roots = [matrix(n, n) for n in (3, 2)]
        self.H, self.K = [r @ r.mT + torch.eye(len(r)) for r in roots]
        self.B, self.C, self.D = matrix(3, 4), matrix(2, 3), matrix(2, 4)
        self.x, self.y, self.z = (torch.zeros(n, requires_grad=True) for n in (4, 3, 2))
        with torch.no_grad():
            self.x += matrix(4)
            self.y += torch.linalg.solve(self.H, self.B @ self.x)
            self.z += torch.linalg.solve(self.K, self.C @ self.y + self.D @ self.x)

    def first(self) -> Tensor:
        return 0.5 * self.y @ self.H @ self.y - self.y @ self.B @ self.x

    def second(self) -> Tensor:
        return 0.5 * self.z @ self.K @ self.z - self.z @ (self.C @ self.y + self.D @ self.x)

    def upper(self) -> Tensor:
        return 0.5 * self.z @ self.z + 0.1 * self.x @ self.x

    def hypergradient(self) -> Tensor:
        dy = torch.linalg.solve(self.H, self.B)
        dz = torch.linalg.solve(self.K, self.C @ dy + self.D)
        return dz.mT @ self.z.detach() + 0.2 * self.x.detach()

    def problems(self) -> list[LowerProblem]:
        return [
            LowerProblem([self.y], self.first, answers=[-1]),
            LowerProblem([self.z], self.second, answers=[-1, 0]),
        ]


def test_several_problems_that_depend_on_each_other_have_the_slope_of_the_hypergradient() -> None:
    graph = Graph()
    outer = BiSLS([graph.x], lower=Level(graph.problems()), solver=EXACT)
    start = float(graph.upper().detach())
    graph.x.grad = graph.hypergradient()
    outer.step(graph.upper)
    record = outer.record
    assert record is not None and record.moved
    assert record.slope_ratio == pytest.approx(1.0)
    assert record.value <= start - outer.rule.c * record.step_size * record.slope
    # All is quadratic, and y and z are on their solutions: phi is F along the path.
    with torch.no_grad():
        graph.y.copy_(torch.linalg.solve(graph.H, graph.B @ graph.x))
        graph.z.copy_(torch.linalg.solve(graph.K, graph.C @ graph.y + graph.D @ graph.x))
    assert float(graph.upper().detach()) == pytest.approx(record.value)


@pytest.mark.parametrize("several", [True, False])
def test_a_hypergradient_of_the_wrong_sign_is_replaced_by_that_of_the_response(several: bool) -> None:
    graph, right = Graph(), Graph()
    for g, sign in ((graph, -1.0), (right, 1.0)):
        problems = g.problems() if several else [LowerProblem([g.y], g.first)]
        outer = BiSLS([g.x], lower=Level(problems), solver=EXACT, momentum=False)
        f = g.upper if several else lambda g=g: 0.5 * g.y @ g.y + 0.1 * g.x @ g.x
        h = g.hypergradient()
        if not several:
            h = torch.linalg.solve(g.H, g.B).mT @ g.y.detach() + 0.2 * g.x.detach()
        g.x.grad = sign * h
        outer.step(f)
        assert outer.record is not None and outer.record.slope_ratio == pytest.approx(sign)
    torch.testing.assert_close(graph.x, right.x)


def test_an_inverse_that_does_not_know_its_error_is_replaced_until_it_is_needed() -> None:
    H = torch.diag(torch.tensor([1.0, 4.0]))
    rhs, product = [torch.ones(2)], lambda v: [H @ v[0]]
    inverse = IterativeInverse(Identity(0.5))
    assert not inverse.certified
    torch.testing.assert_close(inverse.solve(product, rhs).tensors[0], torch.tensor([1.0, 0.25]), rtol=0.1, atol=0.1)
    assert inverse.fall_back() and not inverse.fall_back()
    torch.testing.assert_close(inverse.solve(product, rhs).tensors[0], torch.tensor([0.5, 0.5]))
    assert not inverse.refinable and not inverse.refine()


def test_an_inverse_is_refined_twice() -> None:
    inverse = IterativeInverse(Neumann(1, 0.1))
    assert [inverse.refine() for _ in range(3)] == [True, True, False]
    finer = refined(CG(max_iterations=3, tolerance=0.1))
    assert finer == CG(max_iterations=6, tolerance=0.01)
    assert refined(Neumann(3, 0.1, random=True)) is None
    solvers = (CG(), Neumann(3, 0.1), Identity(), Neumann(3, 0.1, random=True))
    assert [certified(solver) for solver in solvers] == [True, True, False, False]


def test_without_a_lower_level_y_stays_or_the_error_says_what_is_missing() -> None:
    x = torch.ones(2, requires_grad=True)
    outer = BiSLS([x])
    x.grad = torch.ones_like(x)
    with pytest.raises(LowerLevelError, match="does not depend on the upper parameters directly"):
        outer.step(lambda: (0.0 * x).sum() + 1.0)
    outer.step(lambda: x.sum() + 5.0)
    assert outer.record is not None and outer.record.slope == pytest.approx(2.0)
