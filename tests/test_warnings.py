"""A warning points to the user's own line, whatever is wrapped around the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptive_bilevel_betty as betty
from adaptive_bilevel import SLS, BiSLS, methods
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import Neumann, implicit
from adaptive_bilevel_torchopt import FunctionalLowerStep
from tests.betty.problems import Level, Variable, engine
from tests.problems import ridge_hpo
from tests.torchopt.modules import pair

TOO_LONG: dict[str, Any] = {"lr": 1e9, "max_trials": 1, "lower_bound": None}  # no trial step gives enough decrease


def plain() -> None:
    x = torch.ones(1, requires_grad=True)
    SLS([x], **TOO_LONG).step(lambda: (x**2).sum())  # here


def scheduled_and_hooked() -> None:
    x = torch.ones(1, requires_grad=True)
    optimizer = SLS([x], **TOO_LONG)
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)  # wraps step
    with torch.enable_grad():
        torch.no_grad()(optimizer.step)(lambda: (x**2).sum())  # here
    scheduler.step()


def upper() -> None:
    x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    outer = BiSLS([x], lower=torch.optim.SGD([y]), **TOO_LONG)
    x.grad = torch.ones(1)
    outer.step(lambda: (x**2 + y**2).sum(), lambda: ((x - y) ** 2).sum())  # here


def torchopt_lower() -> None:
    inner, _, _ = pair(ridge_hpo(), lower=TOO_LONG)
    step = inner.lower.attach()
    step(lambda: inner.objective())  # here


def torchopt_functional() -> None:
    problem = ridge_hpo()
    _, step = FunctionalLowerStep(problem.g, **TOO_LONG).attach(problem.y0, problem.x0)
    step()  # here


def torchopt_upper() -> None:
    inner, meta, _ = pair(ridge_hpo(), **TOO_LONG)
    inner.solve()
    meta.step(inner.val)  # here


def betty_lower() -> None:
    low = Level(
        "inner", lambda p, _: p.module().square().sum(), Variable(torch.ones(1)), lambda p: betty.SLS(p, **TOO_LONG)
    )
    made = betty.bind(engine(low))
    made.run()  # here


def betty_upper() -> None:
    def loss(problem: Any, _: Any) -> Tensor:
        return (problem.outer() - problem.module()).square().sum()

    top = Level(
        "outer",
        lambda p, _: (p.inner() - 3).square().sum(),
        Variable(torch.ones(1)),
        lambda p: betty.BiSLS(p, **TOO_LONG),
    )
    low = Level("inner", loss, Variable(torch.zeros(1)), lambda p: torch.optim.SGD(p, lr=0.1), type="adaptive_cg")
    made = betty.bind(engine(low, top))
    made.run()  # here


def hypergradient() -> None:
    point = ridge_hpo().instance()
    implicit(point.upper, point.lower, [point.x], [point.y], Neumann(50, scale=10.0))  # here


def driver() -> None:
    problem = methods.BilevelProblem(lambda x, y, _: y.square().sum(), lambda x, y, _: (y - x).square().sum())
    few: Any = {"lower_steps": 1, "auxiliary_steps": 1}
    for _ in methods.run("d-tfbo", problem, torch.ones(2), torch.zeros(2), iterations=3, **few):  # here
        pass


CASES = [
    *(plain, scheduled_and_hooked, upper, hypergradient, driver),
    *(torchopt_lower, torchopt_functional, torchopt_upper, betty_lower, betty_upper),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_warning_points_to_the_user_s_line(case: Callable[[], None]) -> None:
    lines, first = inspect.getsourcelines(case)
    here = next(first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))
    with pytest.warns(AdaptiveBilevelWarning) as caught:
        case()
    assert {(w.filename, w.lineno) for w in caught if w.category is AdaptiveBilevelWarning} == {(__file__, here)}
