"""Lower steps inside functions that custom_root decorates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

from adaptive_bilevel import SLS
from adaptive_bilevel.policies import Constant
from adaptive_bilevel_torchopt import FunctionalLowerStep, UpperStep
from tests.optim.helpers import plain
from tests.problems import Problem, ridge_hpo
from tests.torchopt.modules import EXACT_CG, iterate, leaf, pair

custom_root = torchopt.diff.implicit.custom_root


def functional(problem: Problem, T: int = 10, rule: Any = SLS) -> tuple[Any, FunctionalLowerStep]:
    objective = lambda y, x, weight=1.0: weight * problem.g(x, y)  # noqa: E731
    lower = FunctionalLowerStep(objective, rule, linear_solve=EXACT_CG)

    @custom_root(torch.func.grad(objective), argnums=1, solve=EXACT_CG)
    def solve(y: Any, x: Any, weight: float = 1.0) -> Any:
        y, step = lower.attach(y, x, weight)
        for _ in range(T):
            step()
        return y

    return solve, lower


def test_functional_hypergradient_is_the_closed_form() -> None:
    problem = ridge_hpo()
    solve, lower = functional(problem, T=1, rule=Constant(bound=1e-9))
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y = solve(problem.ystar(x.detach()), x)
    expected = problem.dF(x.detach())
    meta.step(lambda: problem.f(x, y), solution=y)
    assert x.grad is not None and (x.grad - expected).norm() <= 1e-5 * expected.norm()


def test_a_functional_solver_takes_the_steps_of_the_module() -> None:
    problem = ridge_hpo()
    inner, meta, x = pair(problem)
    solve, lower = functional(problem)
    x2 = leaf(problem)
    meta2 = UpperStep([x2], lower=lower)
    y: Any = problem.y0
    for _ in range(8):
        iterate(inner, meta)
        y = solve(y.detach(), x2)
        meta2.step(lambda: problem.f(x2, y), solution=y)
    assert torch.equal(x, x2) and torch.equal(inner.y, y)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_functional_solver_may_have_several_tensors_and_more_to_return(kind: Any) -> None:
    problem = ridge_hpo()
    whole, meta, x = pair(problem, T=5)
    objective = lambda y, x: problem.g(x, torch.cat(list(y)))  # noqa: E731
    lower = FunctionalLowerStep(objective, linear_solve=EXACT_CG)

    @custom_root(torch.func.grad(objective), argnums=1, has_aux=True, solve=EXACT_CG)
    def solve(y: Any, x: Any) -> Any:
        y, step = lower.attach(y, x)
        assert type(y) is kind
        losses = [float(step().detach()) for _ in range(5)]
        return tuple(y), losses

    x2 = leaf(problem)
    meta2: Any = UpperStep([x2], lower=lower)
    y = kind(problem.y0.split([2, 3]))
    for _ in range(4):
        iterate(whole, meta)
        y, losses = solve(kind(y), x2)
        meta2.step(lambda: problem.f(x2, torch.cat(list(y))), solution=kind(y))
        assert losses[-1] <= losses[0]
    torch.testing.assert_close(x, x2, rtol=1e-9, atol=0.0)


def test_a_meta_batch_of_tasks_is_one_upper_step() -> None:
    problem, weights = ridge_hpo(), (1.0, 2.0, 0.5)
    solve, lower = functional(problem, T=30)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    expected = problem.dF(x.detach())
    for iteration in range(5):
        ys = [solve(problem.y0, x, w) for w in weights]  # the same solution, three times
        meta.step(lambda: torch.stack([problem.f(x, y) for y in ys]).mean(), solution=ys)
        if iteration == 0:
            assert x.grad is not None and (x.grad - expected).norm() < 1e-2 * expected.norm()
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-4)
    assert meta.optimizer.state["policy"]["count"] == 5
    assert len(lower.state_dict()["tasks"]) == 3
    assert problem.F(x.detach()) < problem.F(problem.x0)


def test_functional_state_is_saved_before_the_tasks_are_met(tmp_path: Any) -> None:
    problem = ridge_hpo()
    solve, lower = functional(problem)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y = solve((problem.y0)[:], x)
    meta.step(lambda: problem.f(x, y), solution=[y])
    torch.save(lower.state_dict(), tmp_path / "saved")
    solve2, lower2 = functional(problem)
    lower2.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    assert plain(lower2.state_dict()) == plain(lower.state_dict())
    ends = [s(problem.y0, x.detach().requires_grad_()) for s in (solve, solve2)]
    assert torch.equal(*ends)
