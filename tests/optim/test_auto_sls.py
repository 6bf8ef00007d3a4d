"""AutoSLS is SLS where all samples are one function, whatever happens between loops, and SLSB where they disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from adaptive_bilevel import SLS, SLSB, AutoSLS, BiSLS, policies
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.policies import SearchState

from .helpers import leaf


def data(seed: int, wrong: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(200, 10, generator=rng)
    labels = torch.sign(features @ torch.randn(10, generator=rng))
    labels[torch.rand(200, generator=rng) < wrong] *= -1
    return features, labels


def loss_of(features: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Logistic regression with a penalty exp(x)."""
    return lambda x, w: softplus(-labels * (features @ w)).mean() + 0.5 * x.exp() * w.square().sum()


def margin(optimizer: Any) -> float:
    return float(optimizer.state["policy"]["margin"])


@pytest.mark.parametrize("lower_steps", [1, 2, 10])
def test_full_batches_of_a_lower_level_are_searched_as_by_sls(lower_steps: int) -> None:
    training, validation = loss_of(*data(0, 0.2)), loss_of(*data(1, 0.0))

    def trained(rule: Any) -> list[Tensor]:
        x, w = leaf(0.0), torch.nn.Parameter(torch.zeros(10))
        inner = rule([w], 1.0)
        outer = BiSLS([x], lower=inner)
        steps = []

        def lower() -> Tensor:
            return training(x.squeeze(), w)

        def upper() -> Tensor:
            return validation(torch.tensor(-30.0), w)

        for _ in range(15):
            for _ in range(lower_steps):
                inner.step(lower)
                steps.append(torch.tensor(inner.record.step_size))
            assign([x], implicit(upper, lower, [x], [w]))
            outer.step(upper)
        return [*steps, x.detach(), w.detach()]

    assert torch.equal(torch.stack(trained(AutoSLS)[:-2]), torch.stack(trained(SLS)[:-2]))


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_wrong_labels_bound_the_steps(direction: str) -> None:
    """In batches of 8, each of which can be fitted: SLS does, and is lost."""
    features, labels = data(0, 0.3)

    def trained(rule: Any) -> tuple[float, Any]:
        rng, w = torch.Generator().manual_seed(1), torch.nn.Parameter(torch.zeros(10))
        optimizer = rule([w], direction=direction)
        for _ in range(500):
            drawn = torch.randint(200, (8,), generator=rng)
            optimizer.step(lambda drawn=drawn: softplus(-labels[drawn] * (features[drawn] @ w)).mean())
        return float(softplus(-labels * (features @ w.detach())).mean()), optimizer

    (auto, optimizer), (bounded, _), (unbounded, _) = map(trained, (AutoSLS, SLSB, SLS))
    assert margin(optimizer) < 0.0
    assert auto < 1.05 * bounded
    assert unbounded > 2.0 * auto


def test_the_margin_sums_what_losses_fell_beyond_the_promise() -> None:
    """Losses 2, 1.5, 1.7 and gains of 4 times .25 with c = .1: M = .5 - .1, and then -.2 - .1 more."""
    policy, state = policies.AutoSLS(bound=0.25, grow=1.0), SearchState()
    found = []
    for loss in (2.0, 1.5, 1.7):
        record, state = policy.step(state, loss=loss, slope=4.0, trial=lambda a: 0.0, rounding=0.0)
        assert record.step_size == 0.25
        found.append(state.margin)
    assert found == pytest.approx([0.0, 0.4, 0.1])


@pytest.mark.parametrize(("change", "expected"), [(100.0, -1.0), (-100.0, 1.0)])
def test_a_change_of_the_problem_weighs_no_more_than_a_step(change: float, expected: float) -> None:
    policy = policies.AutoSLS(bound=0.25, grow=1.0, lower_bound=-1e3)
    _, state = policy.step(policy.init(), loss=2.0, slope=4.0, trial=lambda a: -math.pi)
    _, state = policy.step(state, loss=2.0 + change, slope=4.0, trial=lambda a: -1e3, rounding=0.0)
    assert state.margin == pytest.approx(expected - 0.1)


def test_the_bound_holds_where_the_margin_is_negative() -> None:
    policy = policies.AutoSLS(bound=0.25, grow=2.0)
    state = SearchState(count=3, previous=0.25, last_loss=1.0, last_gain=1.0, largest_gain=1.0)
    sample: dict[str, Any] = {"slope": 1e-3, "trial": lambda a: 0.0}
    agreed, _ = policy.step(state, loss=0.5, **sample)
    disagreed, _ = policy.step(state, loss=0.99, **sample)
    assert agreed.step_size == 0.5
    assert disagreed.step_size == 0.125  # .25 / sqrt(3 + 1)


def test_a_step_that_does_not_move_leaves_no_trace() -> None:
    policy = policies.AutoSLS()
    _, state = policy.step(policy.init(), loss=2.0, slope=4.0, trial=lambda a: 2.0 * (1.0 - a) ** 2)
    samples: list[dict[str, Any]] = [
        {"loss": math.nan, "slope": 4.0},
        {"loss": 9.0, "slope": 0.0},
        {"loss": 9.0, "slope": -1.0},
    ]
    for sample in samples:
        assert policy.step(state, trial=lambda a: 0.0, **sample)[1] == state
    assert policy.step(state, loss=9.0, slope=4.0, trial=lambda a: 10.0)[1] == state
