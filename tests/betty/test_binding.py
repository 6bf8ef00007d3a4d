"""Binding, options that survive Betty's rebuilding, copies and checkpoints."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptive_bilevel as core
from adaptive_bilevel import policies
from adaptive_bilevel.bilevel.options import SearchOptions
from adaptive_bilevel.bilevel.pace import EveryStep
from adaptive_bilevel.errors import ClosureError, OptionError
from adaptive_bilevel.hypergradient import CG, Identity, Neumann
from adaptive_bilevel_betty import (
    SLS,
    SLSB,
    SPSB,
    AdaptiveEngine,
    AutoSLS,
    BiSLS,
    BiSPS,
    DecSPS,
    OneStepBiSLS,
    SPSMax,
    bind,
)
from adaptive_bilevel_betty.bound_problem import BoundProblem
from tests.betty.problems import Ridge, Variable, engine, sgd, state
from tests.optim.helpers import plain

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave")

UPPER = [BiSPS, BiSLS, OneStepBiSLS]
ALL = [SPSMax, SPSB, DecSPS, SLS, SLSB, AutoSLS, *UPPER]


@pytest.mark.parametrize("cls", ALL)
def test_an_unbound_step_says_what_to_add(cls: Any) -> None:
    top, low = Ridge().levels(cls if cls in UPPER else sgd(0.1), SLS if cls in UPPER else cls)
    made = engine(low, top)
    made.outer.module.zero_grad()
    optimizer = (made.outer if cls in UPPER else made.inner).optimizer
    with pytest.raises(ClosureError, match=r"bind\(engine\)"):
        optimizer.step()
    with pytest.raises(ClosureError, match=r"Add  bind\(engine\)  after"):
        made.run()


def test_the_engine_that_binds_by_itself() -> None:
    ends = []
    for kind in ("bind", "AdaptiveEngine"):
        top, low = Ridge().levels(BiSLS, SLS, type="darts")
        made = engine(low, top, steps=40, kind=AdaptiveEngine) if kind != "bind" else bind(engine(low, top, steps=40))
        made.run()
        ends.append(state(made))
    assert ends[0] == ends[1]


def test_binding_twice_is_binding_once() -> None:
    ends = []
    for times in (1, 3):
        top, low = Ridge().levels(BiSLS, SLS)
        made = engine(low, top, steps=40)
        for _ in range(times):
            bind(made)
        made.run()
        ends.append((state(made), low.evaluations, top.evaluations))
    assert ends[0] == ends[1]


def test_optimizers_given_as_arguments() -> None:
    from betty.configs import Config
    from betty.problems import ImplicitProblem

    class Alone(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            loss: Tensor = (self.module() - 3.0).square().sum()
            return loss

    module = Variable(torch.zeros(2))
    alone = Alone(
        "alone",
        config=Config(),
        module=module,
        optimizer=SLS(module.parameters()),
        train_data_loader=[(torch.zeros(1),)],
    )
    bind(engine(alone, steps=30)).run()
    assert torch.allclose(module.value, torch.full((2,), 3.0), atol=1e-3)


HOSTED = {"lower", "hypergradient", "project", "search"}
"""What Betty gives, or has no place for."""


@pytest.mark.parametrize("cls", ALL)
def test_every_option_survives_being_built_anew(cls: Any) -> None:
    """As Betty does: optimizer.__class__(params, **optimizer.defaults)."""
    base = getattr(core, cls.__name__)
    options: dict[str, Any] = {
        "c": 0.3, "shrink": 0.6, "grow": 1.5, "reset": "keep", "slack": 0.1, "lower_bound": -1.0, "max_step": 7.0,
        "max_trials": 9, "direction": "adam", "betas": (0.8, 0.9), "eps": 1e-5, "max_skips": 4, "decay": "inverse",
        "floor": 0.01, "floor_decay": "inverse", "response": "tangent", "carry": False, "curvature": 0.4,
        "baseline": "matched", "response_steps": 3, "lr_min": 0.001, "momentum": False, "pace": "auto",
            "products": "difference",
    }  # fmt: skip
    known = set(inspect.signature(base.__init__).parameters) - {"self", "params", "lr", *HOSTED}
    if "options" in known:
        known = known - {"options"} | set(SearchOptions.__annotations__)
    given: dict[str, Any] = {name: options[name] for name in known & set(options)}
    if cls is BiSLS:
        given["solver"] = CG(7, 1e-3, warm_start=True)
    assert known <= set(given), "an option of the core that this test does not know"
    first = cls([torch.ones(2, requires_grad=True)], 0.7, **given)
    again = cls([torch.ones(2, requires_grad=True)], **first.defaults)
    assert again.defaults == first.defaults
    assert again.records == first.records
    assert [{**g, "params": 0} for g in again.param_groups] == [{**g, "params": 0} for g in first.param_groups]
    if cls is BiSLS:
        assert again.solver == first.solver == given["solver"]
    assert all(isinstance(v, (int, float, str, tuple, type(None))) for v in first.defaults.values())


@pytest.mark.parametrize("solver", [CG(), Neumann(5, 0.2), Identity(0.3)])
def test_solvers_are_plain_text(solver: Any) -> None:
    first = BiSLS([torch.ones(2, requires_grad=True)], solver=solver)
    assert first.solver == solver
    assert BiSLS([torch.ones(2, requires_grad=True)], **first.defaults).solver == solver
    assert BiSLS([torch.ones(2, requires_grad=True)], solver=repr(solver)).solver == solver
    fresh = BiSLS([torch.ones(2, requires_grad=True)])
    fresh.load_state_dict(first.state_dict())
    assert fresh.solver == solver


@pytest.mark.parametrize("solver", [CG(77, 1e-9), Neumann(3, 0.1, random=True, generator=torch.Generator())])
def test_a_solver_that_is_set_stays(solver: Any) -> None:
    top, low = Ridge().levels(BiSLS, SLS)
    bind(engine(low, top))
    top.optimizer.solver = solver
    top.optimizer.load_state_dict(top.optimizer.state_dict())
    assert top.optimizer.solver is solver
    assert BoundProblem.of(low).solver is solver
    if isinstance(solver, CG):
        assert copy.deepcopy(top.optimizer).solver == solver


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (BiSLS, {"solver": "LU()"}, "not a solver"),
        (BiSLS, {"solver": "__import__('os')"}, "not a solver"),
        (BiSLS, {"solver": 3}, "plain values"),
        (BiSLS, {"solver": Neumann(3, 0.1, random=True, generator=torch.Generator())}, "without generator"),
        (BiSLS, {"solver": "CG(tolerance=-1)"}, "tolerance"),
        (BiSLS, {"lower": None}, "bind"),
        (BiSPS, {"lower": None}, "bind"),
        (BiSLS, {"project": None}, "param_callback"),
        (BiSLS, {"search": policies.SLS()}, "plain values"),
        (BiSLS, {"pace": EveryStep()}, "plain values"),
        (OneStepBiSLS, {"lower": None}, "bind"),
        (SPSB, {"decay": lambda k: 1.0}, "scheduler"),
        (SLS, {"c": 2.0}, "c"),
    ],
)
def test_options_that_cannot_be(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        cls([torch.ones(1, requires_grad=True)], **options)


def test_unknown_options_raise() -> None:
    for cls in ALL:
        with pytest.raises(TypeError, match="nesterov"):
            cls([torch.ones(1, requires_grad=True)], nesterov=True)


def test_copies_are_not_bound() -> None:
    top, low = Ridge().levels(sgd(0.1), SLS)
    made = bind(engine(low, top, steps=5))
    made.run()
    for twin in (copy.deepcopy(low.optimizer), pickle.loads(pickle.dumps(low.optimizer))):
        assert plain(twin.state_dict()) == plain(low.optimizer.state_dict())
        with pytest.raises(ClosureError, match="bind"):
            twin.step()
        x = twin.param_groups[0]["params"][0]
        twin.step(lambda x=x: x.square().sum())  # and is an optimizer of the core besides


def test_resuming_is_bitwise() -> None:
    def made() -> Any:
        top, low = Ridge().levels(lambda p: BiSLS(p, direction="adam"), SLS, type="darts")
        return bind(engine(low, top, steps=30))

    whole, first, second = made(), made(), made()
    whole.config.train_iters = whole.train_iters = 60
    whole.run()
    first.run()
    for problem, saved in zip(second.problems, first.problems, strict=True):
        problem.load_state_dict(saved.state_dict())
    # Betty saves no sample; the next lower steps make one before the upper step asks for it.
    second.run()
    assert plain([p.module.state_dict() for p in second.problems]) == plain(
        [p.module.state_dict() for p in whole.problems]
    )
