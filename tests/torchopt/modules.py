"""TorchOpt's modules and solvers for the problems with known solutions, plain and with our steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor

from adaptive_bilevel import SLS
from adaptive_bilevel_torchopt import LowerStep, UpperStep
from tests.optim.helpers import plain
from tests.problems import Problem

SOLVE = torchopt.linear_solve
Base = torchopt.nn.ImplicitMetaGradientModule


def implicit_module(linear_solve: Any = None) -> type[Any]:
    """A module class for a `Problem`: its loop is TorchOpt's own (plain) or ours (after `automatic`)."""

    class Module(torchopt.nn.ImplicitMetaGradientModule, linear_solve=linear_solve):
        def __init__(self, x: Tensor, problem: Problem, T: int = 10, lr: float = 0.1) -> None:
            super().__init__()
            self.x = x
            self.y = torch.nn.Parameter(problem.y0.clone())
            self.problem, self.T, self.lr = problem, T, lr
            self.lower: Any = None

        def automatic(self, rule: Any = SLS, lr: float | None = None, **options: Any) -> Any:
            self.lower = LowerStep(self, rule, lr, **options)
            return self

        def objective(self) -> Tensor:
            return self.problem.g(self.x, self.y)

        def solve(self) -> Any:
            if self.lower is not None:
                step = self.lower.attach()
                for _ in range(self.T):
                    step(lambda: self.objective())
                return self
            params = tuple(self.parameters())
            for p in params:
                p.detach_().requires_grad_()
            optimizer = torchopt.SGD(params, lr=self.lr)
            with torch.enable_grad():
                for _ in range(self.T):
                    loss = self.objective()
                    optimizer.zero_grad()
                    loss.backward(inputs=params)
                    optimizer.step()
            return self

        def val(self) -> Tensor:
            return self.problem.f(self.x, self.y)

    return Module


EXACT_CG = SOLVE.solve_cg(rtol=1e-13)


def leaf(problem: Problem) -> Tensor:
    return problem.x0.detach().clone().requires_grad_()


def pair(
    problem: Problem,
    *,
    linear_solve: Any = EXACT_CG,
    T: int = 10,
    lower: dict[str, Any] | None = None,
    **upper: Any,
) -> tuple[Any, Any, Tensor]:
    """A module with our lower steps, our upper step on x, and x."""
    x = leaf(problem)
    inner = implicit_module(linear_solve)(x, problem, T).automatic(**(lower or {}))
    return inner, UpperStep([x], lower=inner.lower, **upper), x


def iterate(inner: Any, meta: Any, closure: Callable[[], Tensor] | None = None, **options: Any) -> Any:
    inner.solve()
    meta.step(closure or inner.val, **options)
    return meta.record


def snapshot(*things: Any) -> Any:
    return repr(plain([*things, torch.get_rng_state()]))


def stock(problem: Problem, **upper: Any) -> tuple[Any, Any, Tensor]:
    """A module that keeps TorchOpt's own loop, our upper step on x, and x."""
    x = leaf(problem)
    inner = implicit_module(EXACT_CG)(x, problem)
    return inner, UpperStep([x], lower=inner, **upper), x


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(10, 5, generator=rng), torch.randn(10, 2, generator=rng)
