"""Functional solvers whose hypergradient would be wrong: refused with the cause and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.errors import (
    HypergradientError,
    LowerLevelError,
    OptionError,
)
from adaptive_bilevel_torchopt import FunctionalLowerStep, UpperStep
from tests.problems import ridge_hpo
from tests.torchopt.modules import batch, leaf, snapshot


def functional(objective: Callable[..., Tensor], argnums: Any = 1) -> tuple[FunctionalLowerStep, Callable[..., Any]]:
    """A lower step, and a solver that takes one of them."""
    lower = FunctionalLowerStep(objective)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=argnums)
    def solve(y: Any, *given: Tensor) -> Any:
        y, step = lower.attach(y, *given)
        step()
        return y

    return lower, solve


def test_solutions_of_functional_solvers_are_matched_with_their_loops() -> None:
    problem = ridge_hpo()
    objective = lambda y, x: problem.g(x, y)  # noqa: E731
    lower, solve = functional(objective)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(problem.y0, x)
    f = lambda: problem.f(x, y)  # noqa: E731
    with pytest.raises(LowerLevelError, match="solution=None"):
        meta.step(f)
    with pytest.raises(LowerLevelError, match="shapes"):
        meta.step(f, solution=[y, y])
    lower.rewind()
    y = solve(problem.y0, x)
    with pytest.raises(LowerLevelError, match="shapes"):
        meta.step(f, solution=y[:2])
    with pytest.raises(HypergradientError, match="do not come from a solve"):
        meta.step(f, solution=problem.y0.clone())
    meta.step(f, solution=y)
    with pytest.raises(OptionError, match="pass it alone"):
        UpperStep([x], lower=[lower, lower])


def test_a_functional_objective_with_a_hidden_upper_variable_is_refused() -> None:
    problem = ridge_hpo()
    x, z = leaf(problem), torch.ones(1, requires_grad=True)
    objective = lambda y, x: problem.g(x, y) + z.square().sum() * y.square().sum()  # noqa: E731
    lower, solve = functional(objective)
    meta: Any = UpperStep([x, z], lower=lower)
    y: Any = solve(problem.y0, x)
    with pytest.raises(HypergradientError, match="argument that argnums names"):
        meta.step(lambda: problem.f(x, y), solution=y)


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("argnums", "depends", "refused"),
    [((1, 2), True, False), (1, True, True), (1, False, False), ((1, 2), False, False)],
)
def test_an_upper_variable_that_argnums_forgets_is_refused(
    argnums: Any, depends: bool, refused: bool, direct: bool, upper: Any
) -> None:
    problem = ridge_hpo()
    x, z = leaf(problem), torch.ones(1, requires_grad=True)
    objective = lambda y, x, z: problem.g(x, y) + (z.square().sum() * y.square().sum() if depends else 0)  # noqa: E731
    lower, solve = functional(objective, argnums)
    meta: Any = UpperStep([x, z], upper, lower=lower)
    y: Any = solve(problem.y0, x, z)
    f = lambda: problem.f(x, y) + (z.square().sum() + x.square().sum() if direct else 0.0)  # noqa: E731
    before = snapshot(x, z, x.grad, z.grad, meta.state_dict())
    if refused:
        with pytest.raises(HypergradientError, match="argument that argnums names"):
            meta.step(f, solution=y)
        assert snapshot(x, z, x.grad, z.grad, meta.state_dict()) == before
    else:
        meta.step(f, solution=y)
        assert meta.record.moved


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("computed", [lambda x: x.exp().log(), lambda x: x + 0.0], ids=["saved", "linear"])
def test_an_argument_that_is_computed_from_an_upper_parameter_is_refused(computed: Any, upper: Any) -> None:
    """A trial step would not change it."""
    problem = ridge_hpo()
    lower, solve = functional(lambda y, x: problem.g(x, y))
    x = leaf(problem)
    meta: Any = UpperStep([x], upper, lower=lower)
    y: Any = solve(problem.y0, computed(x))
    with pytest.raises(HypergradientError, match="argument that argnums names, and compute from them in the objective"):
        meta.step(lambda: problem.f(x, y), solution=y)


@pytest.mark.parametrize(("argnums", "match"), [(1, "depends on no meta-parameter.*argnums"), (2, "argnums=1")])
def test_argnums_that_name_no_upper_parameter_or_pass_one_over(argnums: int, match: str) -> None:
    """TorchOpt itself raises an IndexError unless argnums are the first ones."""
    problem = ridge_hpo()
    x, weight = leaf(problem), torch.ones(())
    objective = lambda y, weight, x: weight * problem.g(x, y)  # noqa: E731
    lower, solve = functional(objective, argnums)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(problem.y0, weight, x)
    with pytest.raises(HypergradientError, match=match):
        meta.step(lambda: problem.f(x.detach(), y), solution=y)


@pytest.mark.parametrize("name", ["BatchNorm", "dropout"])
def test_functional_solvers_refuse_what_their_backward_cannot_repeat(name: str) -> None:
    layer = nn.Dropout() if name == "dropout" else nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(5, 3), layer, nn.Linear(3, 2))
    names = [name for name, _ in net.named_parameters()]
    data = batch(0)

    def fit(y: Any) -> Tensor:
        out: Tensor = torch.func.functional_call(net, dict(zip(names, y, strict=True)), data[0])
        return (out - data[1]).square().mean()

    def objective(y: Any, x: Tensor) -> Tensor:
        return fit(y) + (x.exp() * torch.stack([p.square().sum() for p in y]).sum()).sum()

    lower, solve = functional(objective)
    x = torch.zeros(1, requires_grad=True)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(tuple(p.detach() for p in net.parameters()), x)
    with pytest.raises(HypergradientError, match=rf"{name}.*\.eval\(\)"):
        meta.step(lambda: fit(y), solution=y)
    lower.rewind()
    net.eval()
    y = solve(tuple(p.detach() for p in net.parameters()), x)
    meta.step(lambda: fit(y), solution=y)
    assert meta.record.moved
