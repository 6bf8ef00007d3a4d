"""Optimizers inside of wrappers that behave as those of trainers do; no trainer is needed here.

`AcceleratedOptimizer` (Accelerate 1.x) is a torch optimizer with an ``optimizer``, whose step takes a closure and
returns nothing. `LightningOptimizer` (Lightning 2.x) takes the optimizer's class and a copy of its attributes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, OneStepBiSLS, SPSMax, diagnose, monitor
from adaptive_bilevel.errors import ClosureError, OptionError
from adaptive_bilevel.hypergradient import implicit
from tests.hosts.problem import Problem, optimizers, plainly


class Accelerated(torch.optim.Optimizer):
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as it does where it places tensors

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class Lightning:
    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
        self.__class__ = type("Lightning", (self.__class__, optimizer.__class__), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return self._optimizer.step(closure=closure, **kwargs)


class Around:
    """An object that is no optimizer at all."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.step = getattr(optimizer, "step", None)


WRAPPERS: dict[str, Any] = {"accelerated": Accelerated, "lightning": Lightning, "around": Around}
WRAPPERS["twice"] = lambda optimizer: Around(Lightning(optimizer))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_optimizers_go_as_those_inside(name: str, when: str) -> None:
    expected, reference = plainly(4)
    problem = Problem()
    inner, outer = optimizers(problem)
    lower = wrapped = WRAPPERS[name](inner)
    if when == "before":
        outer = BiSLS([problem.decay], lower=lower, direction="adam", hypergradient=implicit)
    upper = WRAPPERS[name](outer)
    for _ in range(4):
        for _ in range(5):
            wrapped.step(problem.lower)
        upper.step(problem.upper)
    assert torch.equal(problem.decay, expected.decay) and torch.equal(problem.model.weight, expected.model.weight)
    assert outer.lower.optimizers == [inner]  # type: ignore[attr-defined]
    assert monitor(upper) == monitor(reference) and monitor(upper)["lower/trials"] == inner.record.trials  # type: ignore[union-attr]
    assert diagnose(upper) == diagnose(reference)


def test_stock_optimizers_inside_of_a_wrapper() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    stock = torch.optim.SGD([y], lr=0.25)
    outer = BiSLS([x], lower=Accelerated(stock), hypergradient=implicit)
    outer.step(lambda: (y + x).square().sum(), lambda: (y - x).square().sum())
    assert monitor(outer)["lower/step_size"] == 0.25
    with pytest.raises(OptionError, match="must be the optimizer of the lower level"):
        BiSLS([x], lower=Around(torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("cls", [BiSLS, BiSPS, OneStepBiSLS])
def test_a_closure_under_torchs_name_is_all_that_a_step_needs(cls: Any) -> None:
    """What trainers call: step(closure=f), for every class."""
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    inner = SLS([y])
    outer = Lightning(cls([x], lower=Lightning(inner), hypergradient=implicit))

    def lower() -> Tensor:
        return (y - x).square().sum() + y.pow(4).sum()

    losses = []
    for _ in range(3):
        Lightning(inner).step(closure=lower)
        losses.append(float(outer.step(closure=lambda: (y + 0.5 * x - 0.3).square().sum())))
    assert losses[-1] < losses[0] and not torch.equal(x, torch.ones(2))


@pytest.mark.parametrize("cls", [SPSMax, DecSPS, SPSB, SLS, SLSB, AutoSLS], ids=lambda cls: cls.__name__)
def test_so_it_is_at_the_lower_level(cls: Any) -> None:
    y = torch.ones(2, requires_grad=True)
    inner = Lightning(cls([y]))
    losses = [float(inner.step(closure=lambda: (y - 0.3).square().sum())) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("cls", [BiSLS, BiSPS, OneStepBiSLS])
@pytest.mark.parametrize("estimated", [False, True], ids=["in .grad", "estimated"])
def test_a_trainers_own_closure_is_refused(cls: Any, estimated: bool) -> None:
    """It runs the whole training step: lower steps and backward."""
    problem = Problem()
    inner = SLS(problem.model.parameters())
    outer = Lightning(cls([problem.decay], lower=inner, hypergradient=implicit if estimated else None))
    inner.step(problem.lower)
    problem.decay.grad = torch.ones_like(problem.decay)
    before = [p.detach().clone() for p in problem.parameters()]

    def closure() -> Tensor:
        inner.step(problem.lower)
        loss = problem.upper()
        loss.backward()
        return loss.detach()

    with pytest.raises(ClosureError, match=r"inside the closure(.|\n)*inner.step\(lower_loss\)"):
        outer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(problem.parameters(), before, strict=True))


def test_a_step_inside_of_its_own_closure_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    inner = SLS([x])
    with pytest.raises(ClosureError, match="inside the closure"):
        inner.step(lambda: inner.step(lambda: x.square().sum()))
    assert torch.equal(x, torch.ones(2))
