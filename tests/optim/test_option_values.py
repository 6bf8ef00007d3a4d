"""Values of options: what is refused and how it is named, and what each optimizer needs of a lower bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, DecSPS, SPSMax
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import Outcome
from tests.optim.helpers import (
    OptimizerInfo,
    every_class,
    every_optimizer,
    every_polyak,
    every_search,
    leaf,
    plain,
    quadratic,
)

SHARED: dict[str, list[Any]] = {
    "lr": [0.0, -1.0, math.nan, "fast", True],
    "c": [0.0, -1.0, math.nan, "1"],
    "lower_bound": [math.inf, math.nan, "0"],
    "direction": ["lbfgs", None, 1],
    "betas": [(0.9,), (1.0, 0.999), (0.9, -0.1), 0.9, "ab", (0.9, "b"), (math.nan, 0.9)],
    "eps": [-1e-8, math.nan, None, math.inf],
    "max_skips": [0, -1, 1.5, None, True],
}
OWN: dict[type, dict[str, list[Any]]] = {
    SPSMax: {"decay": ["sqrt", None], "floor": [-1.0, math.inf, math.nan], "floor_decay": ["fast"]},
    SPSB: {"decay": ["sqrt", 2], "floor": [-0.1], "floor_decay": [None]},
    DecSPS: {},
    SLS: {
        "c": [1.0, 1.5],
        "shrink": [0.0, 1.0, 2.0, math.nan],
        "grow": [0.9, math.inf, math.nan, "2"],
        "reset": ["often", 1, None],
        "slack": [-1.0, math.inf],
        "max_step": [0.0, -1.0, math.nan],
        "max_trials": [0, 1.5, -3],
        "lr": [math.inf],
    },
    SLSB: {"shrink": [1.0], "grow": [0.5], "reset": ["x"], "slack": [math.nan], "max_trials": [0], "decay": ["x"]},
    AutoSLS: {"shrink": [1.0], "grow": [0.5], "reset": ["x"], "slack": [math.nan], "max_trials": [0], "decay": ["x"]},
}


def nonsense() -> list[Any]:
    cases = []
    for cls, own in OWN.items():
        for table in (SHARED, own):
            cases += [
                pytest.param(cls, name, v, id=f"{cls.__name__}({name}={v!r})") for name in table for v in table[name]
            ]
    return cases


@pytest.mark.parametrize(("cls", "name", "value"), nonsense())
def test_wrong_options_are_named(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\({name}=.*: .*{name} must") as caught:
        cls([leaf()], **{name: value})
    assert isinstance(caught.value, OptionError)
    assert repr(value) in str(caught.value)


@every_class
def test_unknown_keywords_raise(info: OptimizerInfo) -> None:
    with pytest.raises(TypeError, match="momentum"):
        info.cls([leaf()], momentum=0.9)


@every_polyak
def test_without_lr_and_lower_bound_nothing_can_be_found(info: OptimizerInfo) -> None:
    with pytest.raises(OptionError, match="give one of the two"):
        info.cls([leaf()], lower_bound=None)


@every_polyak
def test_polyak_rules_need_a_lower_bound_at_the_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], lower_bound=None)
    before = plain(optimizer.state_dict())
    with pytest.raises(OptionError, match="lower bound"):
        optimizer.step(lambda: quadratic(x))
    assert plain(optimizer.state_dict()) == before
    optimizer.step(lambda: quadratic(x), lower_bound=0.0)
    assert optimizer.record.moved


@every_search
def test_searches_do_without_a_lower_bound(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], 10.0, lower_bound=None)
    optimizer.step(lambda: quadratic(x) - 1e6)
    assert optimizer.record.moved


@every_class
def test_an_invalid_lower_bound_of_a_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    for value in (math.nan, "low"):
        with pytest.raises(OptionError, match="lower_bound"):
            optimizer.step(lambda: quadratic(x), lower_bound=value)
    assert x.tolist() == [3.0, 2.0]


@every_optimizer
def test_an_infinite_bound_is_no_bound(info: OptimizerInfo) -> None:
    x = leaf()
    if info.searches:
        return
    optimizer = info.make([x], math.inf)
    optimizer.step(lambda: quadratic(x))
    assert torch.isfinite(x).all()
    assert optimizer.record.outcome == Outcome.accepted
    assert math.isfinite(optimizer.param_groups[0]["step_size"])
