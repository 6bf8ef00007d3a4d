"""When a search is due: always, except where no trial could tell anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.bilevel.pace import Always, EveryStep
from adaptive_bilevel.bilevel.scale import Scale
from adaptive_bilevel.optim.state import RoleState
from adaptive_bilevel.policies import SLS as Policy
from adaptive_bilevel.policies import SearchState

EPS = torch.finfo(torch.float64).eps


def at(previous: float, rejected: bool, promised: float, value: float = 1.0) -> Any:
    scale = Scale(SearchState(previous=previous), rejected)
    return SimpleNamespace(path=SimpleNamespace(promised=promised), scale=scale, value=value, rounding=EPS)


@pytest.mark.parametrize(
    ("previous", "rejected", "promised", "kept"),
    [
        (1.0, True, 0.5 * EPS, 1.0),
        (1.0, True, 2.0 * EPS, None),  # f can tell
        (1.0, False, 0.5 * EPS, None),  # a first step may be that short by choice
        (0.0, True, 0.5 * EPS, None),  # there is no step to keep
    ],
)
def test_a_step_is_kept_where_its_promise_is_rounding(
    previous: float, rejected: bool, promised: float, kept: float | None
) -> None:
    assert EveryStep().propose(at(previous, rejected, promised), RoleState()) == kept
    assert Always().propose(at(previous, rejected, promised), RoleState()) is None


def test_what_a_hypergradient_that_was_scaled_promises_is_known_from_the_last_search() -> None:
    scale = Scale(SearchState(previous=1.0), True)
    assert scale.stalled(0.5 * EPS, 1.0, EPS) and not scale._replace(ratio=100.0).stalled(0.5 * EPS, 1.0, EPS)
    assert scale._replace(ratio=1e-3).stalled(0.5 * EPS, 1.0, EPS)


def test_a_kept_step_takes_no_trial_and_no_product() -> None:
    """At a solution, up to rounding."""
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    inner = SLS([y], 0.5)
    outer = BiSLS([x], 8.0, lower=inner)
    upper = lambda: 1.0 + (y - 1.0).square().sum() + (x - 1.0).square().sum()  # noqa: E731
    with torch.no_grad():
        x += 1e-3
    for _ in range(4):
        inner.step(lambda: (y - x).square().sum())
        x.grad = 4.0 * (x.detach() - 1.0)
        outer.step(upper)
    before = outer.evaluations.lower.hvps, outer.evaluations.upper.values
    x.grad = torch.full_like(x, 1e-12)
    outer.step(upper)
    assert outer.record is not None
    assert (outer.record.trials, outer.record.step_size) == (0, outer.param_groups[0]["step_size"])
    assert (outer.evaluations.lower.hvps, outer.evaluations.upper.values) == before


@pytest.mark.parametrize(
    ("previous", "rejected", "c", "grow"),
    [(0.0, False, 0.5, 2.0), (1.0, False, 0.1, 2.0), (1.0, True, 0.1, 1.2)],
)
def test_the_policy_until_the_scale_is_known(previous: float, rejected: bool, c: float, grow: float) -> None:
    policy = Scale(SearchState(previous=previous), rejected).policy(Policy(c=0.1, shrink=0.5, grow=1.2))
    assert (policy.c, policy.grow) == (c, grow)
