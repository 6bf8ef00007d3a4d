"""Options that do not apply are refused, with the way out; those that the constructor never had are no keywords."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from adaptive_bilevel import BiSLS, BiSPS, OneStepBiSLS, policies
from adaptive_bilevel.bilevel.momentum import Certified
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.direction import Plain
from tests.bilevel.test_roles import Fixed

UNUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "eps of Adam": (BiSLS, {"eps": 1e-4}, "eps=0.0001.*direction='adam'"),
    "betas without any mean": (BiSLS, {"betas": (0.5, 0.9), "momentum": False}, r"betas=\(0.5, 0.9\).*leave it out"),
    "betas of another direction": (BiSLS, {"betas": (0.5, 0.9), "direction": Plain()}, "constants of its own"),
    "momentum of another direction": (BiSLS, {"momentum": True, "direction": Plain()}, "leave momentum out"),
    "a solver of another response": (BiSLS, {"solver": CG(), "response": Fixed()}, "has its own inverse"),
    "options of another policy": (BiSLS, {"search": policies.SLS(), "c": 0.2}, "the policy has options of its own"),
    "betas of the paper's search": (OneStepBiSLS, {"betas": (0.5, 0.9)}, r"betas=\(0.5, 0.9\)"),
    "eps of the paper's search": (OneStepBiSLS, {"eps": 1e-4}, "eps=0.0001"),
    "betas of a Polyak step": (BiSPS, {"betas": (0.5, 0.9)}, r"betas=\(0.5, 0.9\)"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_an_option_that_nothing_reads_is_refused(case: str) -> None:
    cls, options, match = UNUSED[case]
    with pytest.raises(OptionError, match=match) as caught:
        cls([torch.ones(2, requires_grad=True)], **options)
    assert str(caught.value).startswith(f"{cls.__name__}(")


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.5, 0.9)},  # the decay of the mean of hypergradients
        {"betas": (0.5, 0.9), "momentum": True},
        {"betas": (0.5, 0.9), "momentum": Certified()},  # a Momentum is given it
        {"betas": (0.5, 0.9), "eps": 1e-4, "direction": "adam", "momentum": False},
        {"eps": 1e-8},  # what it is anyway
    ],
    ids=["auto", "full", "own", "adam", "default"],
)
def test_an_option_that_something_reads_is_taken(options: dict[str, Any]) -> None:
    BiSLS([torch.ones(2, requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((BiSLS, name) for name in ("baseline", "response_steps", "lrr", "floor")),
        *((OneStepBiSLS, name) for name in ("curvature", "carry", "solver", "response", "max_step", "pace")),
    ],
)
def test_a_keyword_of_another_class_is_unknown(cls: Any, name: str) -> None:
    with pytest.raises(
        TypeError, match=re.escape(f"{cls.__name__}.__init__() got an unexpected keyword argument '{name}'")
    ):
        cls([torch.ones(2, requires_grad=True)], **{name: 1})


def test_a_policy_in_the_place_of_the_options() -> None:
    x = torch.ones(2, requires_grad=True)
    outer = BiSLS([x], 2.0, search=policies.SLSB(bound=1.0, decay="inverse", c=0.3))
    assert isinstance(outer.policy, policies.SLSB)
    assert (outer.defaults["c"], outer.defaults["decay"]) == (0.3, "inverse")
    steps = []
    for _ in range(4):
        x.grad = torch.ones_like(x)
        outer.step(lambda: x.sum() + 100.0)
        steps.append(outer.param_groups[0]["step_size"])
    assert steps == pytest.approx([2.0, 1.0, 2.0 / 3.0, 0.5])
    with pytest.raises(OptionError, match="search must be"):
        BiSLS([x], search=policies.SPSB())  # type: ignore[arg-type]


def test_the_constructor_is_short() -> None:
    assert len(inspect.signature(BiSLS.__init__).parameters) <= 15
