"""Directions from TorchOpt's transformations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

from adaptive_bilevel import SLS, BiSLS, BiSPS
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_torchopt import Transformed
from tests.problems import ridge_hpo
from tests.torchopt.modules import iterate, pair

DIRECTIONS = {
    "adam": torchopt.adam(lr=1.0),
    "adamw": torchopt.adamw(lr=1.0, weight_decay=1e-4),
    "rmsprop": torchopt.rmsprop(lr=1.0),
    "radam": torchopt.radam(lr=1.0),
    "adagrad": torchopt.adagrad(lr=1.0),
    "momentum": torchopt.sgd(lr=1.0, momentum=0.5),
    "decay": torchopt.adam(lr=1.0, weight_decay=1e-4),
    "clipped": torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=0.1), torchopt.adam(lr=1.0)),
    "scaled": torchopt.sgd(lr=0.01),
}


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.filterwarnings("ignore:.*does not descend")
def test_any_transformation_is_an_upper_direction_with_its_true_slope(name: str, upper: Any) -> None:
    problem, transformation = ridge_hpo(), DIRECTIONS[name]
    inner, meta, x = pair(problem, direction=transformation, rule=upper, T=20)
    memory = transformation.init([x])
    moved = 0
    for _ in range(12):
        at = x.detach().clone()
        inner.solve()
        meta.step(inner.val)
        h = x.grad
        assert h is not None
        updates, memory = transformation.update([h.clone()], memory, params=[at], inplace=False)
        slope = -float(h @ updates[0])
        assert meta.record.slope == pytest.approx(slope, rel=1e-6)
        if meta.record.moved:
            moved += 1
            assert torch.equal(x.detach(), at + updates[0] * meta.record.step_size), "scaled, then added"
        else:
            assert slope <= 0.0 and meta.record.outcome == Outcome.no_descent and torch.equal(x.detach(), at)
    assert moved >= 3
    assert problem.F(x.detach()) < problem.F(problem.x0)


def test_a_pair_of_transformations_is_adam_as_in_the_paper() -> None:
    pair_of = Transformed(torchopt.adam(lr=1.0), torchopt.adam(lr=1.0, betas=(0.0, 0.999)))
    ends = []
    for given in ({"direction": pair_of}, {"direction": "adam", "momentum": True}):
        options: dict[str, Any] = {**given, "carry": False}
        inner, meta, x = pair(ridge_hpo(), **options)
        for _ in range(4):
            iterate(inner, meta)
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (torchopt.Adam, "lower case"),
        ("rmsprop", "GradientTransformation"),
        (3, "GradientTransformation"),
    ],
)
def test_other_directions_are_refused(wrong: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        pair(ridge_hpo(), direction=wrong)


def test_a_transformation_s_memory_starts_anew_with_other_parameters() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer: Any = SLS([a, b], direction=Transformed(torchopt.adam(lr=1.0)))
    optimizer.step(lambda: (a**2).sum() + (b**2).sum())
    optimizer.step(lambda: (a**2).sum())
    assert optimizer.state["direction"]["shapes"] == [(2,)]
    optimizer.step(lambda: (a**2).sum() + (b**2).sum())
    assert optimizer.record is not None and optimizer.record.moved
