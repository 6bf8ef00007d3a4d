"""Options of policies: what is refused, and policies as frozen values."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.errors import AdaptiveBilevelError
from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    SPSB,
    AutoSLS,
    Constant,
    DecSPS,
    Envelope,
    GradientNorm,
    SPSMax,
)
from tests.policies.helpers import (
    every_policy,
)

WRONG: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    *[
        (family, {"bound": value})
        for family in (Constant, SPSMax, SPSB, DecSPS, Envelope, SLSB, AutoSLS)
        for value in (0.0, -1.0, math.nan, "1", True)
    ],
    (Constant, {"bound": None}),
    (Constant, {"bound": math.inf}),
    (SLSB, {"bound": math.inf}),
    (AutoSLS, {"bound": math.inf}),
    *[(SLS, {"start": value}) for value in (0.0, -1.0, math.nan, math.inf, "1")],
    *[(SLS, {"max_step": value}) for value in (0.0, -1.0, math.nan)],
    *[(SPSB, {"c": value}) for value in (0.0, -1.0, math.nan, math.inf, "sqrt", None)],
    *[(DecSPS, {"c": value}) for value in (0.0, -1.0, math.inf)],
    *[(family, {"c": value}) for family in (SLS, SLSB) for value in (0.0, 1.0, -1.0, math.nan, 2)],
    *[(SLS, {"shrink": value}) for value in (0.0, 1.0, 2.0, -0.5, None)],
    *[(SLS, {"grow": value}) for value in (0.5, 0, math.inf, math.nan, "2", True)],
    *[(SLS, {"reset": value}) for value in ("always", 1, None)],
    *[(SLS, {"slack": value}) for value in (-1e-9, math.inf, math.nan)],
    *[(SLS, {"max_trials": value}) for value in (0, -1, 2.5, True)],
    *[(family, {"lower_bound": value}) for family in (SPSB, SLS) for value in (math.nan, math.inf, -math.inf, "0")],
    *[(family, {"decay": value}) for family in (SPSB, SLSB, AutoSLS, Constant) for value in ("linear", None, 0.5)],
    (DecSPS, {"decay": "inverse"}),
    *[(Envelope, {"floor": value}) for value in (-0.1, math.inf, math.nan)],
    (Envelope, {"floor_decay": "linear"}),
    *[(GradientNorm, {"initial": value}) for value in (0.0, -1.0, math.inf, math.nan)],
    (GradientNorm, {"coupling": "sum"}),
]


@pytest.mark.parametrize(("family", "option"), WRONG, ids=lambda part: getattr(part, "__name__", repr(part)))
def test_wrong_options(family: Any, option: dict[str, Any]) -> None:
    given = {"bound": 1.0, **option} if family is Constant else option
    with pytest.raises(ValueError) as caught:
        family(**given)
    assert isinstance(caught.value, AdaptiveBilevelError)
    ((name, value),) = option.items()
    said = str(caught.value)
    assert said.startswith(f"{family.__name__}({name}={value!r})")
    assert said.split(": ", 1)[1]  # the remedy


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.float64(0.5), np.int64(3)], ids=repr)
def test_numpy_numbers_are_numbers(value: Any) -> None:
    assert SPSB(bound=value).bound == value
    count: Any = np.int64(3)
    assert SLS(max_trials=count).max_trials == 3
    assert SLS(start=value).start == value


@every_policy
def test_a_policy_is_a_frozen_value(policy: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.bound = 2.0
    assert dataclasses.replace(policy) == policy
    assert hash(dataclasses.replace(policy)) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert pickle.loads(pickle.dumps(policy.init())) == policy.init()
    with pytest.raises(TypeError):
        type(policy)(0.5)  # options are keywords
    with pytest.raises(TypeError, match="momentum"):
        type(policy)(momentum=0.9)
