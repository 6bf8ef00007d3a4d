"""Wrong arguments and options: each error names the remedy."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torchopt
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import (
    AdaptiveBilevelError,
    ClosureError,
    LowerLevelError,
    OptionError,
    TensorError,
)
from adaptive_bilevel.policies import Constant
from adaptive_bilevel_torchopt import FunctionalLowerStep, LowerStep, UpperStep
from tests.problems import ridge_hpo
from tests.torchopt.modules import pair, stock


def tensor() -> Tensor:
    return torch.ones(1, requires_grad=True)


def solved(make: Any) -> Any:
    inner, meta, _ = make(ridge_hpo())
    inner.solve()
    return meta


def below(**options: Any) -> Any:
    return lambda: pair(ridge_hpo(), lower=options)


WRONG: dict[str, tuple[Any, type[AdaptiveBilevelError], str]] = {
    "no module": (lambda: LowerStep(cast(Any, nn.Linear(2, 2))), OptionError, "ImplicitMetaGradientModule"),
    "an instance": (lambda: below(rule=SLS([tensor()]))(), OptionError, "already belongs"),
    "an upper rule below": (below(rule=BiSLS), OptionError, "SPSMax, DecSPS"),
    "a lower rule above": (lambda: pair(ridge_hpo(), rule=SLS), OptionError, "BiSLS or BiSPS"),
    "an option": (below(c=2.0), OptionError, "c="),
    "two numbers": (below(rule=Constant(bound=0.1), lr=1.0), OptionError, "leave lr out"),
    "no objective": (lambda: FunctionalLowerStep(None), OptionError, "objective"),  # type: ignore[arg-type]
    "lower": (lambda: UpperStep([tensor()], lower=cast(Any, 3)), OptionError, "ImplicitMetaGradientModule"),
    "a closure": (lambda: pair(ridge_hpo())[1].step(None), ClosureError, "pass a function"),
    "a step's closure": (lambda: pair(ridge_hpo())[0].lower.attach()(None), ClosureError, "pass a function"),
    "a dictionary": (
        lambda: FunctionalLowerStep(lambda y: y["a"].sum()).attach({"a": torch.ones(2)}),
        TensorError,
        r"attach\(params=.*dict.*list or tuple of tensors.*values\(\)",
    ),
    "a number": (lambda: FunctionalLowerStep(lambda y: y.sum()).attach(1.0), TensorError, "float.*list or tuple"),
    "a nested list": (lambda: FunctionalLowerStep(sum).attach([[torch.ones(2)]]), TensorError, "list or tuple"),
    "integers": (lambda: FunctionalLowerStep(sum).attach([torch.ones(2).int()]), TensorError, "int32.*floating-point"),
    "a solution": (lambda: solved(pair).step(tensor().sum, solution=tensor()), OptionError, "solution="),
    "a solution of its own loop": (
        lambda: solved(stock).step(tensor().sum, solution=tensor()),
        OptionError,
        "solution=",
    ),
    "no attach": (lambda: pair(ridge_hpo())[0].lower.step(lambda: None), LowerLevelError, r"attach\(\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_names_the_remedy(name: str) -> None:
    make, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        make()


def test_unknown_options_raise_at_construction() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        pair(ridge_hpo(), lower={"nonsense": 1})
    with pytest.raises(TypeError, match="nonsense"):
        pair(ridge_hpo(), nonsense=1)


@pytest.mark.parametrize("rule", [SLS, Constant(bound=0.1)], ids=repr)
def test_constants_of_adam_are_refused_where_nothing_reads_them(rule: Any) -> None:
    for direction in ("sgd", torchopt.sgd(lr=1.0)):
        with pytest.raises(OptionError, match="betas is not used with direction"):
            pair(ridge_hpo(), lower={"rule": rule, "direction": direction, "betas": (0.5, 0.9)})
    pair(ridge_hpo(), lower={"rule": rule, "direction": "adam", "betas": (0.5, 0.9), "eps": 1e-4})
