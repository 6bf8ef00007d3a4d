"""How much of the mean of past hypergradients a step takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS
from adaptive_bilevel.bilevel import MomentumContext
from adaptive_bilevel.bilevel.momentum import Predictive
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.optim.direction import Descent, Gradient
from adaptive_bilevel.optim.state import RoleState, advanced
from tests.bilevel.helpers import lower_search
from tests.problems import random_qb

BETA = 0.9


class Reference:
    """The formulas again, on NumPy arrays, for all hypergradients so far."""

    def __init__(self, metric: np.ndarray) -> None:
        self.metric, self.seen = metric, list[np.ndarray]()
        self.m = np.zeros_like(metric)
        self.n, self.agreement, self.spread = 0, 0.0, 1.0
        self.lag: np.ndarray | None = None

    def step(self, h: np.ndarray) -> tuple[np.ndarray, float]:
        if self.lag is not None:
            last, lag = self.seen[-1], self.lag / self.metric
            size = h @ (h / self.metric) + last @ (last / self.metric)
            self.agreement = BETA * self.agreement + (1 - BETA) * float((h - last) @ lag / size)
            self.spread = BETA * self.spread + (1 - BETA) * float(self.lag @ lag / size)
        self.seen.append(h)
        self.n, self.m = self.n + 1, BETA * self.m + (1 - BETA) * h
        theta = float(np.clip(self.agreement / self.spread, 0, 1))
        direction = ((1 - theta) * h + theta * self.m / (1 - BETA**self.n)) / self.metric
        if direction @ h <= 0:
            self.n, self.m, theta, direction = 1, (1 - BETA) * h, 0.0, h / self.metric
        self.lag = self.m / (1 - BETA**self.n) - h
        return direction, theta


def metric_of(scale: Tensor) -> Descent:
    return Descent(lambda g: [g[0] / scale])


def run(hypergradients: list[Tensor], scale: Tensor) -> tuple[list[float], list[bool]]:
    """Compare with the reference; return each step's theta, and whether the mean was started anew."""
    x, role, reference = torch.zeros_like(scale), Predictive(), Reference(scale.numpy())
    state, thetas, restarts = role.init()._replace(each=[{}]), [], []
    for h in hypergradients:
        context = MomentumContext(Gradient([x], [h], [1.0]), metric_of(scale), BETA)
        mix = role.propose(context, state)
        expected, theta = reference.step(h.numpy())
        stepped = context.descent.precondition([h]) if mix.along is None else mix.along()
        np.testing.assert_allclose(stepped[0].numpy(), expected, rtol=1e-9, atol=1e-12)
        assert mix.weight == pytest.approx(theta, abs=1e-9)
        state = advanced(state, role.commit(context, mix, state))
        thetas.append(mix.weight)
        restarts.append(mix.restarted)
    return thetas, restarts


def test_noise_on_a_slow_gradient_calls_for_the_mean() -> None:
    torch.manual_seed(0)
    slow = torch.randn(500)
    thetas, restarts = run([0.1 * slow + torch.randn(500) for _ in range(60)], torch.rand(500) + 0.1)
    assert thetas[0] == thetas[1] == 0.0
    assert min(thetas[30:]) > 0.85
    assert not any(restarts)


def test_an_exact_gradient_that_turns_slowly_calls_for_the_last() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(50), torch.randn(50)
    thetas, _ = run([start + k / 60 * (end - start) for k in range(60)], torch.rand(50) + 0.1)
    assert max(thetas) == 0.0


def test_large_hypergradients_at_the_start_do_not_outweigh_the_later_ones() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(50), torch.randn(50)
    turning = [start + k / 60 * (end - start) for k in range(60)]
    thetas, _ = run([*(1e3 * torch.randn(50) for _ in range(20)), *turning], torch.ones(50))
    assert max(thetas[-20:]) < 0.3


def test_a_gradient_that_alternates_calls_for_the_mean() -> None:
    slow, zigzag = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    thetas, _ = run([slow + (-1) ** k * zigzag for k in range(40)], torch.ones(2))
    assert min(thetas[20:]) > 0.9


def test_a_mixture_that_ascends_is_not_taken() -> None:
    torch.manual_seed(1)
    noisy = [torch.ones(20) + torch.randn(20) for _ in range(60)]
    thetas, restarts = run([*noisy, *(-h for h in noisy)], torch.ones(20))
    assert restarts[60]
    assert thetas[60] == 0.0
    assert not restarts[61]  # it was started anew


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_the_options(direction: str) -> None:
    """momentum=False is a decay of 0; with a decay of 0, nothing is mixed; the first two steps are always certified.

    Only with "auto", Adam's metric has shrinkage.
    """

    def trajectory(steps: int, **options: Any) -> list[Tensor]:
        point = random_qb(3).instance()
        inner = lower_search(point.y)
        outer: Any = BiSLS([point.x], lower=inner, direction=direction, c=0.1, pace="every", **options)
        found = []
        for _ in range(steps):
            inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], CG(tolerance=1e-10)))
            outer.step(point.upper)
            found.append(point.x.detach().clone())
        return found

    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    beta2 = 0.999
    plain = trajectory(12, momentum=False)
    assert same(plain, trajectory(12, momentum="auto", betas=(0.0, beta2))) == (direction == "sgd")
    assert same(plain[:2], trajectory(2, momentum="auto")) == (direction == "sgd")
    assert not same(plain[:2], trajectory(2, momentum=True))
    assert same(trajectory(12), trajectory(12, momentum="auto"))


def test_on_exact_problems_it_does_not_cost_what_the_mean_costs() -> None:
    """Median over seeds: a mean that is always taken loses to one that is taken as far as it predicts."""
    gaps: dict[Any, list[float]] = {True: [], "auto": []}
    for momentum, found in gaps.items():
        for seed in range(8):
            problem = random_qb(seed)
            point = problem.instance()
            inner, solver = lower_search(point.y), CG(tolerance=1e-10)
            outer = BiSLS([point.x], lower=inner, direction="adam", momentum=momentum, solver=solver)
            start = problem.F(point.x.detach())
            for _ in range(40):
                for _ in range(3):
                    inner.step(point.lower)
                assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], solver))
                outer.step(point.upper)
            found.append(problem.F(point.x.detach()) / start)
    assert np.median(gaps["auto"]) < np.median(gaps[True])


class Own:
    """A direction of a user's: the gradient."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        return Descent(list)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Any = True) -> RoleState:
        return state


@pytest.mark.parametrize(("direction", "c"), [("sgd", 0.1), (Own("sgd"), 0.5), (Own("other"), 0.1)])
def test_nothing_is_mixed_into_a_direction_of_ones_own(direction: Any, c: float) -> None:
    """So steps along the gradient itself are all certified, and have that Armijo constant."""
    point = random_qb(3).instance()
    inner = lower_search(point.y)
    outer: Any = BiSLS([point.x], lower=inner, direction=direction, pace="every")
    for _ in range(6):
        inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], CG(tolerance=1e-10)))
        outer.step(point.upper)
    assert outer.policy.c == c
    assert ("mean" in outer.state["prediction"]) == (direction == "sgd")
