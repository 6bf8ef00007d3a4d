"""Levels that do not meet, or are moved by somebody else: said in the first steps, with the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SPSB, BiSLS, Box
from adaptive_bilevel.bilevel import OneStepBiSLS
from adaptive_bilevel.errors import AdaptiveBilevelError
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.policies import Outcome

UPPER = [BiSLS, OneStepBiSLS]


def said(run: Callable[[], Any]) -> str:
    """Return all that was said, warnings and an error of the package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except AdaptiveBilevelError as error:
            return "\n".join([*(str(w.message) for w in caught), str(error)])
    return "\n".join(str(w.message) for w in caught)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Ridge:
    """y*(x) = 2 / (1 + x), wanted at 3: x wants to be negative."""

    def __init__(self, start: float = 0.5) -> None:
        self.x, self.y = leaf(start, start), leaf(0.0, 0.0)

    def lower(self) -> Tensor:
        return ((self.y - 2) ** 2).sum() + (self.x * self.y**2).sum()

    def upper(self) -> Tensor:
        return ((self.y - 3) ** 2).sum()

    def step(self, inner: Any, outer: Any) -> None:
        for _ in range(4):
            inner.step(self.lower)
        assign([self.x], implicit(self.upper, self.lower, [self.x], [self.y]))
        outer.step(self.upper)


# ---------------------------------------------------------------- x moved by somebody else

MOVES: dict[str, Callable[[Tensor], Any]] = {
    "clamp": lambda x: x.clamp_(0.1),
    "data": lambda x: x.data.clamp_(0.1),
    "copy": lambda x: x.copy_(x.clamp(min=0.1)),
    "norm": lambda x: x.div_(x.norm()),
}


@pytest.mark.parametrize("make", UPPER, ids=lambda c: c.__name__)
@pytest.mark.parametrize("move", MOVES)
def test_a_habit_of_moving_x_names_project(make: Any, move: str) -> None:
    problem = Ridge()
    inner = SLS([problem.y])
    outer = make([problem.x], lower=inner)

    def run() -> None:
        for _ in range(8):
            problem.step(inner, outer)
            with torch.no_grad():
                MOVES[move](problem.x)

    assert said(run).count("project=") == 1


@pytest.mark.parametrize("event", ["nothing", "restart", "resume", "project", "swap", "rebound"])
def test_who_may_move_x_is_not_told(event: str) -> None:
    problem = Ridge(2.0)
    inner = SLS([problem.y])
    outer = BiSLS([problem.x], lower=inner, project=Box(0.1, 3.0) if event == "project" else None)

    def run() -> None:
        saved = outer.state_dict(), inner.state_dict(), problem.x.detach().clone()
        for k in range(8):
            problem.step(inner, outer)
            with torch.no_grad():
                if event == "restart" and k % 3 == 2:  # now and then
                    problem.x.fill_(2.0)
                if event == "resume":  # a checkpoint in each round
                    problem.x.copy_(saved[2])
                    outer.load_state_dict(saved[0])
                if event == "swap":  # away and back, as for an evaluation
                    kept = problem.x.clone()
                    problem.x.zero_()
                    problem.x.copy_(kept)
                if event == "project":
                    problem.x.clamp_(0.1, 3.0)
                if event == "rebound":
                    problem.x.add_(0.1)
                    outer.bind(inner)

    assert "project=" not in said(run)


def test_a_middle_level_is_moved_by_the_prediction_above() -> None:
    x, y, z = leaf(1.0), leaf(0.5), leaf(0.0)
    low = SLS([z])
    middle = BiSLS([y], lower=low)
    top = BiSLS([x], lower=middle, carry=True)

    def g() -> Tensor:
        return ((z - y) ** 2).sum()

    def f() -> Tensor:
        return ((z - 1) ** 2).sum() + ((y - x) ** 2).sum()

    def run() -> None:
        for _ in range(6):
            low.step(g)
            assign([y], implicit(f, g, [y], [z]))
            middle.step(f)
            x.grad = torch.ones_like(x) * (x.detach() - 3)
            top.step(lambda: ((y - 3) ** 2).sum() + ((x - 3) ** 2).sum(), lower_closure=f)

    assert "project=" not in said(run)


# ---------------------------------------------------------------- levels that do not meet


@pytest.mark.parametrize("anew", ["optimizer", "model"])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("make", UPPER, ids=lambda c: c.__name__)
def test_an_inner_level_made_anew(make: Any, anew: str, bound: bool) -> None:
    problem = Ridge(2.0)
    outer = make([problem.x], lower=SLS([problem.y]))
    outer.lower.optimizers[0].step(problem.lower)

    def run() -> None:
        for _ in range(4):
            if anew == "model":
                problem.y = leaf(0.0, 0.0)
            inner = SLS([problem.y])
            if bound:
                outer.bind(inner)
            problem.step(inner, outer)

    assert ("bind(" in said(run)) != bound


@pytest.mark.parametrize("entries", [slice(0, 2), slice(2, 4)])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_hypergradient_of_entries_that_the_sample_does_not_see(entries: slice, direction: str) -> None:
    x, y = torch.zeros(5, dtype=torch.float64, requires_grad=True), leaf(0.0, 0.0)
    A, t = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inner = SLS([y])
    outer = BiSLS([x], lower=inner, direction=direction)
    seen = [i for i in range(5) if i not in range(5)[entries]]

    def lower() -> Tensor:
        return (x[seen].sigmoid() * (A[seen] @ y - t[seen]) ** 2).mean() + 0.01 * (y**2).sum()

    def run() -> None:
        inner.step(lower)
        h = torch.zeros_like(x)
        h[entries] = 0.1
        x.grad = h
        outer.step(lambda: ((A @ y - t) ** 2).mean())

    heard = said(run)
    assert "entries" in heard and "lower_closure=" in heard
    assert not x.any() and outer.record is not None and outer.record.outcome == Outcome.no_descent
    x.grad = torch.full_like(x, 0.1)  # now some of it is seen
    assert "entries" not in said(lambda: outer.step(lambda: ((A @ y - t) ** 2).mean()))


def test_the_sample_of_the_hypergradient_can_be_given() -> None:
    x, y = torch.zeros(4, dtype=torch.float64, requires_grad=True), leaf(0.0, 0.0)
    A, t = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inner = SPSB([y])
    outer = BiSLS([x], lower=inner)

    def lower(rows: list[int]) -> Callable[[], Tensor]:
        return lambda: (x[rows].sigmoid() * (A[rows] @ y - t[rows]) ** 2).mean() + 0.01 * (y**2).sum()

    def upper() -> Tensor:
        return ((A @ y - t) ** 2).mean()

    def run() -> None:
        for _ in range(3):
            inner.step(lower([2, 3]))
            assign([x], implicit(upper, lower([0, 1]), [x], [y]))
            outer.step(upper, lower([0, 1]))

    assert said(run) == "" and x[:2].all() and not x[2:].any()


def test_an_upper_loss_of_copies() -> None:
    problem = Ridge(2.0)
    inner = SLS([problem.y])
    outer = BiSLS([problem.x], lower=inner)
    inner.step(problem.lower)
    assign([problem.x], implicit(problem.upper, problem.lower, [problem.x], [problem.y]))

    def upper() -> Tensor:
        return ((problem.y.detach() - 3) ** 2).sum() + (problem.x**2).sum()

    assert "does not depend on any parameter of the lower" in said(lambda: outer.step(upper))
