"""Sets of parameters that change mid-run, on either optimizer: the run goes on, and all that may move moves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, SPSMax
from adaptive_bilevel.bilevel import OneStepBiSLS
from adaptive_bilevel.hypergradient import assign, implicit

LOWER = [SLS, SLSB, AutoSLS, SPSMax, SPSB, DecSPS]
UPPER = [BiSLS, OneStepBiSLS, BiSPS]
EVENTS = ["add", "freeze", "unfreeze", "swap"]


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def listed(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def change(optimizer: Any, event: str, second: Tensor) -> Tensor:
    """Change the set of an optimizer's tensors, and return the second tensor as it is from now on."""
    if event == "add":
        optimizer.add_param_group({"params": [second]})
    elif event == "swap":
        new = second.detach().clone().requires_grad_()
        optimizer.replace_parameters([new if p is second else p for p in listed(optimizer)])
        return new
    else:
        second.requires_grad_(event == "unfreeze")
        second.grad = None
    return second


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize(
    ("lower_rule", "upper_rule"),
    [*((rule, BiSLS) for rule in LOWER), (SLS, OneStepBiSLS), (SLS, BiSPS), (SPSB, BiSPS)],
    ids=lambda rule: rule.__name__,
)
def test_the_run_goes_on(lower_rule: Any, upper_rule: Any, level: str, event: str, direction: str) -> None:
    x, u, y, z = leaf(0.3, -0.2, 0.4), leaf(0.5, 0.1), leaf(0.0, 0.1, 0.2), leaf(0.0, 0.3)
    if event == "unfreeze":
        (z if level == "lower" else u).requires_grad_(False)
    inner = lower_rule([y] if (event, level) == ("add", "lower") else [y, z], direction=direction)
    outer = upper_rule([x] if (event, level) == ("add", "upper") else [x, u], lower=inner, direction=direction)

    def lower() -> Tensor:
        return ((y - x) ** 2).sum() + ((z - u) ** 2).sum() + 0.3 * (y**2).sum() + 0.1 * (z**2).sum()

    def upper() -> Tensor:
        return ((y - 1) ** 2).sum() + ((z - 2) ** 2).sum() + 0.01 * ((x**2).sum() + (u**2).sum())

    marks: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no trial step")  # of the paper's search
        for k in range(10):
            if k == 4:
                if level == "lower":
                    z = change(inner, event, z)
                else:
                    u = change(outer, event, u)
                marks = [t.detach().clone() for t in (x, u, y, z)]
            for _ in range(3):
                inner.step(lower)
            above, below = ([p for p in listed(o) if p.requires_grad] for o in (outer, inner))
            assign(above, implicit(upper, lower, above, below))
            outer.step(upper)
    trained = {id(p) for o in (outer, inner) for p in listed(o) if p.requires_grad}
    for tensor, mark in zip((x, u, y, z), marks, strict=True):
        assert torch.equal(tensor, mark) == (id(tensor) not in trained)
        assert tensor.isfinite().all()
