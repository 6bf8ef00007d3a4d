"""The integration's optimizers are the core's steps with a host: their classes, their lower level, their solver."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import adaptive_bilevel as core
from adaptive_bilevel.bilevel import LowerLevel
from adaptive_bilevel.errors import LowerLevelError, OptionError
from adaptive_bilevel.evaluation.guard import Guard, Workspace
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel_betty import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, OneStepBiSLS, SPSMax, bind
from adaptive_bilevel_betty.bound_problem import BoundProblem
from adaptive_bilevel_betty.lower_problems import LowerProblems
from adaptive_bilevel_betty.optimizers import UNBOUND
from adaptive_bilevel_betty.solver_text import SolverOption
from tests.betty.problems import Level, Ridge, Variable, engine, only_new, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave")

ALL = [SPSMax, SPSB, DecSPS, SLS, SLSB, AutoSLS, BiSPS, BiSLS, OneStepBiSLS]


@pytest.mark.parametrize("cls", ALL)
def test_a_class_adds_no_method(cls: Any) -> None:
    """It says which host is asked before `bind`, and writes its options as plain values; the step is the core's."""
    own = {name for name in vars(cls) if not name.startswith("__")} - {"unbound", "step"}  # torch wraps step per class
    assert own == ({"solver"} if cls is BiSLS else set())
    assert cls.unbound is UNBOUND
    (base,) = cls.__bases__
    assert base is getattr(core, cls.__name__).__bases__[0]


@pytest.mark.parametrize("cls", ALL)
def test_a_host_is_set_by_bind_only(cls: Any) -> None:
    upper = cls in (BiSPS, BiSLS, OneStepBiSLS)
    top, low = Ridge().levels(cls if upper else sgd(0.1), sgd(0.1) if upper else cls)
    made = engine(low, top)
    optimizer: AdaptiveOptimizer = (top if upper else low).optimizer
    assert optimizer.host is UNBOUND
    bind(made)
    assert isinstance(optimizer.host, BoundProblem)
    assert copy.deepcopy(optimizer).host is UNBOUND


def test_the_lower_level_of_a_copy_is_the_optimizers_below() -> None:
    top, low = Ridge().levels(BiSLS, SLS)
    bind(engine(low, top, steps=20)).run()
    assert isinstance(top.optimizer.lower, LowerProblems)
    for twin in (copy.deepcopy(top.optimizer), pickle.loads(pickle.dumps(top.optimizer))):
        assert isinstance(twin.lower, LowerLevel)
        assert [type(o) for o in twin.lower.optimizers] == [SLS]
        assert torch.equal(twin.lower.tensors()[0], low.value)


def test_a_step_of_the_users_own() -> None:
    """With closures, the bound optimizer is one of the core."""
    ends = []
    for which in ("betty", "core"):
        x, y = (torch.tensor([v], requires_grad=True) for v in (2.0, 0.0))

        def f(x: Any = x, y: Any = y) -> Any:
            return ((y - 1.0) ** 2 + 0.1 * x**2).sum()

        def g(x: Any = x, y: Any = y) -> Any:
            return ((y - x) ** 2).sum()

        if which == "core":
            outer: Any = core.BiSLS([x], lower=core.SLS([y]))
        else:
            top, low = Level("outer", f, Variable(x), BiSLS), Level("inner", g, Variable(y), SLS)
            top._loss = low._loss = lambda p, b: p.module().sum()
            made = engine(low, top)
            bind(made)
            outer, x, y = top.optimizer, top.module.value, low.module.value
        for _ in range(5):
            x.grad = 0.2 * x.detach() + 2 * (y.detach() - 1.0)
            outer.step(lambda x=x, y=y: f(x, y), lower_closure=lambda x=x, y=y: g(x, y))
        ends.append((x.detach().clone(), y.detach().clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_problems_below() -> None:
    """One problem answers to x by a joint loss; of several, each says which variables it answers to."""
    loss = lambda p, b: p.module().square().sum()  # noqa: E731
    one, two = (Level(name, loss, Variable(torch.ones(2)), rule) for name, rule in (("a", SLS), ("b", sgd(0.3))))
    top = Level("top", loss, Variable(torch.ones(2)), BiSLS, retain_graph=True)
    made = engine(one, two, top, edges=[(one, two), (two, top)], ahead=[(top, one)])
    bind(made)
    lower = LowerProblems(BoundProblem.of(top))
    with Guard(lower.tensors(), Workspace()) as guard:
        first, second = lower.problems(None, guard)
        assert [first.answers, second.answers] == [[-1], [0]]
        assert [first.random, second.random] == [guard.entry, guard.entry]
        assert [first.step_size, second.step_size] == [1.0, 0.3]
        two.module.requires_grad_(False)
        with pytest.raises(LowerLevelError, match="'b' is frozen"):
            lower.problems(None, guard)
    alone = engine(*(Level(name, loss, Variable(torch.ones(2)), rule) for name, rule in (("c", SLS), ("above", BiSLS))))
    bind(alone)
    with Guard([], Workspace()) as guard:
        (only,) = LowerProblems(BoundProblem.of(alone.above)).problems(None, guard)
    assert only.answers is None


@only_new
def test_nothing_is_carried_where_the_engine_rolls_back() -> None:
    top, low = Ridge().levels(BiSLS, SLS)
    bind(engine(low, top, roll_back=True))
    lower, before = LowerProblems(BoundProblem.of(top)), low.value.clone()
    lower.carry([torch.ones(8)], 1.0)
    assert torch.equal(low.value, before)


def test_a_solver_is_text_and_object() -> None:
    first = SolverOption.of(CG(7))
    assert first.solver == repr(CG(7))
    assert SolverOption(solver=repr(CG(9)), used=CG(7)).used == CG(9)
    assert SolverOption(solver=None, used=CG(7)) == first
    with pytest.raises(OptionError, match="not a solver"):
        SolverOption(solver="LU()", used=CG(7))


def test_a_solver_that_is_set_is_saved() -> None:
    optimizer = BiSLS([torch.ones(2, requires_grad=True)])
    optimizer.solver = CG(77)
    assert optimizer.defaults["solver"] == optimizer.param_groups[0]["solver"] == repr(CG(77))
    response: Any = optimizer.roles.response
    assert response.solver is optimizer.solver
    other = BiSLS([torch.ones(2, requires_grad=True)])
    other.load_state_dict(optimizer.state_dict())
    assert other.solver == CG(77)
    response = other.roles.response
    assert response.solver is other.solver
