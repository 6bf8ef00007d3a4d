"""Saving, loading, copying, rebuilding and scheduling the upper optimizers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.bilevel.options import SearchOptions
from adaptive_bilevel.errors import LowerLevelError, OptionError
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.projection import Box
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import everything, iterate
from tests.problems import Instance, random_qb

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (BiSLS, {}),
    "sgd automatic": (BiSLS, {"lr": None}),
    "adam": (BiSLS, {"direction": "adam"}),
    "adam automatic": (BiSLS, {"direction": "adam", "lr": None}),
    "adam carried": (BiSLS, {"direction": "adam", "carry": True}),
    "box": (BiSLS, {"project": Box(-1.0, 1.0)}),
    "step": (OneStepBiSLS, {}),
    "step automatic": (OneStepBiSLS, {"lr": None}),
    "bisps": (BiSPS, {}),
    "bisps automatic": (BiSPS, {"lr": None}),
    "bisps adam": (BiSPS, {"direction": "adam"}),
}
LOWER: dict[str, Any] = {
    "SLS": lambda y: SLS([y], 1.0, lower_bound=None),
    "SLSB": lambda y: SLSB([y], 1.0, lower_bound=None),
    "AutoSLS": lambda y: AutoSLS([y], 1.0, lower_bound=None),
    "SPSB": lambda y: SPSB([y], lower_bound=-100.0),
    "SLS adam": lambda y: SLS([y], 1.0, lower_bound=None, direction="adam"),
}


def made(case: str, lower: str, seed: int = 1, x: Any = None, y: Any = None, **more: Any) -> tuple[Instance, Any, Any]:
    cls, options = CASES[case]
    point = random_qb(seed).instance(x, y)
    inner = LOWER[lower](point.y)
    return point, inner, cls([point.x], **{"lr": 1.0, **options, **more}, lower=inner)


def over(x: Tensor, y: Tensor) -> Instance:
    problem = random_qb(1)
    return Instance(x, y, lambda: problem.f(x, y), lambda: problem.g(x, y))


def trace(point: Instance, inner: Any, outer: Any, iterations: int) -> list[str]:
    states = []
    for _ in range(iterations):
        iterate(inner, outer, point, 1, CG())
        states.append(everything([point.x, point.y], inner, outer))
    return states


PAIRS = [(case, lower) for case in CASES for lower in LOWER if lower == "SLS" or case in ("sgd", "adam", "bisps")]


@pytest.mark.parametrize(("case", "lower"), PAIRS)
def test_save_load_continue(case: str, lower: str) -> None:
    point, inner, outer = made(case, lower)
    trace(point, inner, outer, 3)
    file = io.BytesIO()
    torch.save([point.x.detach(), point.y.detach(), inner.state_dict(), outer.state_dict()], file)
    if case in ("sgd", "adam") and outer.record.moved:
        assert outer.state["prediction"]["moved"]
    file.seek(0)
    x, y, *states = torch.load(file, weights_only=True)
    expected = trace(point, inner, outer, 3)
    again, inner2, outer2 = made(case, lower, x=x, y=y)
    inner2.load_state_dict(states[0])
    outer2.load_state_dict(states[1])
    assert trace(again, inner2, outer2, 3) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(case: str, how: str) -> None:
    point, inner, outer = made(case, "SLS")
    point = over(point.x, point.y)
    trace(point, inner, outer, 3)
    whole = (point.x, point.y, inner, outer)
    x, y, inner2, outer2 = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert outer2.lower.optimizers[0] is inner2
    assert outer2.param_groups[0]["params"][0] is x
    assert inner2.param_groups[0]["params"][0] is y
    assert outer2.evaluations.upper is not outer2.evaluations.lower
    again = over(x, y)
    if CASES[case][0] is BiSLS:
        x.grad = torch.ones_like(x)
        with pytest.raises(LowerLevelError, match="no sample"):
            outer2.step(again.upper)
    assert trace(again, inner2, outer2, 3) == trace(point, inner, outer, 3)


@pytest.mark.parametrize("case", CASES)
def test_rebuilt_from_its_defaults(case: str) -> None:
    point, inner, outer = made(case, "SLS")
    again, inner2, other = made(case, "SLS")
    rebuilt = outer.__class__([again.x], **outer.defaults)
    rebuilt.bind(inner2)
    if case == "box":
        rebuilt.project = other.project
    assert rebuilt.defaults == outer.defaults
    names = set(inspect.signature(type(outer).__init__).parameters)
    if isinstance(outer, BiSLS):
        names = names - {"options"} | set(SearchOptions.__annotations__)
    assert set(outer.defaults) == names - {"self", "params", "lower", "hypergradient", "solver", "project", "search"}
    assert trace(again, inner2, rebuilt, 3) == trace(point, inner, outer, 3)


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_both_take_the_same_call(cls: Any) -> None:
    """The contract's step(upper_closure, lower_closure=None), so that one can stand in the place of the other."""
    values = []
    for how in ("by position", "by name"):
        point = random_qb(1).instance()
        inner = SLS([point.y], 1.0, lower_bound=None)
        outer = cls([point.x], 1.0, lower=inner)
        inner.step(point.lower)
        point.x.grad = torch.ones_like(point.x)
        if how == "by position":
            values.append(outer.step(point.upper, point.lower))
        else:
            values.append(outer.step(upper_closure=point.upper, lower_closure=point.lower))
    assert values[0] == values[1]


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_another_optimizer_s_state_is_refused(cls: Any) -> None:
    point = random_qb(1).instance()
    outer = cls([point.x], lower=SLS([point.y], 1.0))
    before = everything([point.x], outer)
    with pytest.raises(OptionError, match=f"{cls.__name__}.load_state_dict.*of another optimizer"):
        outer.load_state_dict(torch.optim.Adam([torch.nn.Parameter(point.x.detach())]).state_dict())
    assert everything([point.x], outer) == before


def test_evaluations_of_the_two_levels_are_apart() -> None:
    for case in CASES:
        point, inner, outer = made(case, "SLS")
        trace(point, inner, outer, 1)
        assert outer.evaluations.upper is not outer.evaluations.lower
        assert outer.evaluations.upper.values >= 1
        assert outer.evaluations.lower.values == 0


def test_defaults_and_state_are_plain() -> None:
    for case in CASES:
        _, _, outer = made(case, "SLS")
        assert all(isinstance(v, (int, float, str, tuple, type(None))) for v in outer.defaults.values())
        assert isinstance(outer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("case", ["sgd", "adam", "bisps", "step"])
def test_lr_zero_moves_nothing(case: str) -> None:
    point, inner, outer = made(case, "SLS")
    trace(point, inner, outer, 2)
    outer.param_groups[0]["lr"] = 0.0
    x = point.x.detach().clone()
    record = iterate(inner, outer, point)
    y = point.y.detach().clone()
    assert torch.equal(point.x, x)
    assert record.step_size == 0.0
    assert record.outcome == Outcome.at_bound
    outer.step(point.upper)
    assert torch.equal(point.y, y)
    outer.param_groups[0]["lr"] = 1.0
    assert iterate(inner, outer, point).moved or case == "step"


@pytest.mark.parametrize("lr", [2.0, None])
def test_a_scheduler_scales_the_bound_of_bisps(lr: float | None) -> None:
    point, inner, outer = made("bisps", "SLS")
    outer = BiSPS([point.x], lr, lower=inner, decay="constant")
    scheduler = torch.optim.lr_scheduler.StepLR(outer, 1, gamma=0.5)
    bounds = []
    for _ in range(3):
        bounds.append(iterate(inner, outer, point).bound)
        scheduler.step()
    if lr is not None:
        assert bounds == [2.0, 1.0, 0.5]
    assert bounds[2] <= 0.51 * bounds[1]


def test_a_scheduler_scales_the_first_trial_of_bisls() -> None:
    point, inner, _ = made("sgd", "SLS")
    outer: Any = BiSLS([point.x], 1e-6, lower=inner, reset="initial")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(outer, 0.1)
    for expected in (1e-6, 1e-7, 1e-8):
        assert iterate(inner, outer, point).step_size == pytest.approx(expected)
        scheduler.step()


def test_a_new_lower_level_starts_anew() -> None:
    """A model that is replaced (a new task) may have tensors of other shapes."""
    x = torch.tensor([2.0], requires_grad=True)
    outer: Any = BiSLS([x], 0.1, direction="adam")
    for size in (3, 5):
        y = torch.zeros(size, requires_grad=True)
        inner = SLS([y], 0.1)
        outer.bind(inner)
        for _ in range(2):
            inner.step(lambda: (y - x).square().sum())
            x.grad = torch.ones(1)
            outer.step(lambda: (y + x).square().sum())
        assert outer.record.moved


def test_a_callable_decay_is_given_again() -> None:
    x = torch.ones(1, requires_grad=True)
    outer = BiSPS([x], 1.0, decay=lambda k: 1.0)
    assert outer.defaults["decay"] == "callable"
    with pytest.raises(OptionError, match="decay="):
        BiSPS([x], 1.0).load_state_dict(outer.state_dict())
