"""What the tests of the methods share: runs on the test problems, a drawn Neumann term, a stochastic problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adaptive_bilevel import methods
from adaptive_bilevel.hypergradient import CG, Exact, Implicit, Neumann
from tests.problems import Problem

EXACT = Implicit(Exact())


class Drawn:
    """The random Neumann term with the given numbers of factors, one per solve."""

    warm_start, resamples = False, False

    def __init__(self, *factors: int, terms: int = 3, scale: float = 0.25) -> None:
        self.factors, self.terms, self.scale = iter(factors), terms, scale

    def solve(self, matvec: Any, rhs: Any, initial: Any = None) -> Any:
        v = rhs
        for _ in range(next(self.factors)):
            v = [a - self.scale * b for a, b in zip(v, matvec(v), strict=True)]
        return Neumann(steps=0, scale=self.terms * self.scale).solve(matvec, v)


def problem_of(problem: Problem) -> methods.BilevelProblem:
    return methods.BilevelProblem(
        upper_loss=lambda x, y, _: problem.f(x, y), lower_loss=lambda x, y, _: problem.g(x, y)
    )


def run(name: str, problem: Problem, iterations: int, **options: Any) -> list[methods.IterationRecord]:
    x, y = options.pop("x", problem.x0), options.pop("y", problem.y0)
    return list(methods.run(name, problem_of(problem), x, y, iterations=iterations, **options))


def finite(records: list[methods.IterationRecord]) -> bool:
    return all(bool(torch.isfinite(t).all()) for r in records for t in (r.x, r.y))


def data(count: int = 48) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, generator=rng), torch.randint(3, (count,), generator=rng)


def network_problem() -> methods.BilevelProblem:
    return methods.BilevelProblem(
        upper_loss=lambda x, model, batch: cross_entropy(model(batch[0]), batch[1]),
        lower_loss=lambda x, model, batch: cross_entropy(model(batch[0] * x.exp()), batch[1]),
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "bisls-sgd": {"lower_steps": 2},
    "bisls-adam": {"lower_steps": 2},
    "saba": {"batches": "blocks"},
    "srba": {"batches": "blocks"},
    "aid-bio": {"solver": CG(2, 0.0, warm_start=True)},
}


def stochastic() -> tuple[methods.BilevelProblem, Tensor, dict[str, Tensor]]:
    """Softmax regression with weights exp(x) on the features, and dropout."""

    def loss(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        dropped = nn.functional.dropout(batch[0] * x.exp(), 0.2)
        return cross_entropy(dropped @ y["w"] + y["b"], batch[1]) + 0.05 * (
            y["w"].square().sum() + y["b"].square().sum()
        )

    problem = methods.BilevelProblem(upper_loss=loss, lower_loss=loss)
    return problem, torch.zeros(6), {"w": torch.zeros(6, 3), "b": torch.zeros(3)}


def start(name: str, iterations: int = 6, **more: Any) -> methods.Run:
    options = {**OPTIONS.get(name, {}), **more}
    batches = methods.Minibatches(data(), data(), size=12, blocks=options.pop("batches", None) == "blocks", seed=5)
    problem, x, y = stochastic()
    return methods.run(name, problem, x, y, iterations=iterations, batches=batches, seed=11, **options)
