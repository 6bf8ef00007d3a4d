"""Samples that know a part of x only: y answers to their moves by less than its tangent."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.optim.coverage import coverage

EXACT = CG(max_iterations=10, tolerance=0.0)


def test_the_part_of_the_entries_seen_so_far() -> None:
    x, z = torch.zeros(4, requires_grad=True), torch.zeros(2, requires_grad=True)
    state: Any = defaultdict(dict)
    for h, expected in (([1.0, 1.0, 0.0, 0.0], 1.0), ([0.0, 2.0, 1.0, 0.0], 2 / 3), ([0.0] * 4, 1.0)):
        covered = coverage([x], [torch.tensor(h)], state)
        assert covered.answer == pytest.approx(math.sqrt(expected))
        assert coverage([x], [torch.tensor(h)], state).answer == covered.answer  # nothing is kept before
        covered.commit()
    assert coverage([x, z], [torch.ones(4), torch.ones(2)], state).answer == 1.0
    # A parameter without a gradient this time is not in the sample.
    coverage([z], [torch.ones(2)], state).commit()
    assert coverage([x], [torch.ones(4)], state).answer == pytest.approx(math.sqrt(4 / 6))
    z.requires_grad_(False)
    assert coverage([x], [torch.ones(4)], state).answer == 1.0  # frozen, it does not move at all
    assert coverage([], [], {}).answer == 1.0


class Samples:
    """g_i = (y - x_i)^2 / 2 on one sample a time, f = (y - target)^2 / 2: y*(x) of all samples is the mean of x."""

    def __init__(self, count: int, **options: Any) -> None:
        self.x = torch.zeros(count, requires_grad=True)
        self.y = torch.zeros((), requires_grad=True)
        self.target = 1.0
        self.inner = SLS([self.y])
        self.outer = BiSLS([self.x], lower=self.inner, solver=EXACT, **options)

    def upper(self) -> Tensor:
        return (self.y - self.target) ** 2 / 2

    def step(self, i: int) -> None:
        def lower() -> Tensor:
            return (self.y - self.x[i]) ** 2 / 2

        self.inner.step(lower)
        assign([self.x], implicit(self.upper, lower, [self.x], [self.y], EXACT))
        self.outer.step(self.upper)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_slope_and_trial_are_those_of_the_part(direction: str) -> None:
    """The slope is part times what the hypergradient promises; and the tangent is exact, so no step is disbelieved."""
    problem = Samples(4, direction=direction, momentum=False, carry=True)
    for k in range(12):
        x, problem.target = problem.x.detach().clone(), float(k + 1)
        part = math.sqrt(1 / min(k + 1, 4))
        seen: list[float] = []
        upper = problem.upper

        def recorded() -> Tensor:
            seen.append(float(problem.y.detach()))
            return upper()

        problem.upper = recorded  # type: ignore[method-assign]
        problem.step(k % 4)
        problem.upper = upper  # type: ignore[method-assign]
        before, record = seen[0], problem.outer.record
        assert record is not None and record.moved
        h, moved = float(problem.x.grad[k % 4]), float(problem.x.detach()[k % 4] - x[k % 4])  # type: ignore[index]
        assert record.slope_ratio == pytest.approx(1.0)
        assert record.slope * record.step_size == pytest.approx(-part * h * moved)
        assert seen[-1] - before == pytest.approx(part * moved)  # dy*/dx_i of the sample alone is 1
        assert float(problem.y.detach()) == pytest.approx(seen[-1])


def test_steps_are_longer_where_samples_know_less() -> None:
    """With one sample in 64, the model's minimizer is at sqrt(64) times the step of a sample that knows all."""
    steps = {}
    for count in (1, 64):
        problem = Samples(count, momentum=False, carry=False)
        for k in range(4 * count):
            problem.step(k % count)
        assert problem.outer.record is not None
        steps[count] = problem.outer.record.step_size
    assert steps[64] > 3.0 * steps[1]


def test_slopes_of_a_part_are_no_reason_to_warn() -> None:
    problem = Samples(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(60):
            problem.step(k % 30)


def test_a_step_that_is_not_finite_covers_nothing_and_a_copy_goes_on_alike() -> None:
    problem = Samples(5)
    for k in range(7):
        problem.step(k % 3)
    covered = problem.outer.state[problem.x]["covered"].clone()
    problem.x.grad = torch.full((5,), math.nan)
    problem.outer.step(problem.upper)
    assert torch.equal(problem.outer.state[problem.x]["covered"], covered)
    assert covered.tolist() == [True, True, True, False, False]

    twin = Samples(5)
    with torch.no_grad():
        twin.x.copy_(problem.x)
        twin.y.copy_(problem.y)
    twin.inner.load_state_dict(copy.deepcopy(problem.inner.state_dict()))
    twin.outer.load_state_dict(copy.deepcopy(problem.outer.state_dict()))
    for k in range(3, 9):
        problem.step(k % 5)
        twin.step(k % 5)
    assert torch.equal(problem.x, twin.x) and torch.equal(problem.y, twin.y)
