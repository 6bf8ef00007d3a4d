"""The direction of L-BFGS where the losses show that f is one function of x, and nothing new where they do not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_bilevel import Ball, BiSLS, Box
from adaptive_bilevel.bilevel.secant import Secants
from adaptive_bilevel.policies import SLS, Outcome
from tests.bilevel.helpers import iterate, lower_search
from tests.optim.helpers import plain
from tests.problems import random_qb

SLOPES = torch.logspace(0, -3, 12, dtype=torch.float64)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (SLOPES * x * x).sum()


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def logistic(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(60, 12, generator=generator, dtype=torch.float64) * SLOPES.sqrt()
    signs = torch.randn(60, generator=generator, dtype=torch.float64).sign()
    return torch.nn.functional.softplus(signs * (X @ x)).mean() + 1e-4 * (x @ x)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"quadratic": quadratic, "rosenbrock": rosenbrock, "logistic": logistic}


def start(seed: int = 0) -> Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def direct(x: Tensor, **options: Any) -> BiSLS:
    return BiSLS([x], hypergradient="direct", **options)


def pairs(outer: BiSLS) -> int:
    state: Any = outer.state
    count: int = state["secants"]["pairs"]
    return count


def shrinkage(outer: BiSLS) -> float:
    states: Any = outer.state
    sums = states.get("momentum", {"agreement": 0.0, "spread": 1.0})
    return 1.0 - min(max(sums["agreement"] / sums["spread"], 0.0), 1.0)


def test_the_direction_is_that_of_dense_updates() -> None:
    """Of the last five pairs, in either metric; the step d is the first trial."""
    for direction in ("sgd", "adam"):
        x, known, second = start(), list[tuple[Any, Any]](), np.zeros(12)
        outer, first, last = direct(x, direction=direction), 0, (np.zeros(12), np.zeros(12))
        for k in range(1, 15):
            before, (h,) = x.detach().numpy().copy(), torch.autograd.grad(rosenbrock(x), x)
            g = h.numpy()
            second = 0.999 * second + 0.001 * g * g
            inverse = np.eye(12)
            if direction == "adam":
                root = np.sqrt(second / (1.0 - 0.999**k))
                w = shrinkage(outer) / (1.0 + np.sqrt((1.0 - 0.999**k) / 0.001))
                inverse = np.diag(1.0 / ((1.0 - w) * root + w * np.sqrt(np.mean(root**2)) + 1e-8))
            if k > 1:
                s, y = before - last[0], g - last[1]
                known += [(s, y)] if s @ y > 0.0 else []
            d, along = g, inverse @ g
            if known:
                s, y = known[-1]
                H = s @ y / (y @ inverse @ y) * inverse
                for s, y in known[-5:]:
                    V = np.eye(12) - np.outer(y, s) / (s @ y)
                    H = V.T @ H @ V + np.outer(s, s) / (s @ y)
                d, along = H @ g, H @ g * np.linalg.norm(inverse @ g) / np.linalg.norm(H @ g)
            outer.step(lambda: rosenbrock(x))
            record: Any = outer.record
            np.testing.assert_allclose(before - x.detach().numpy(), record.step_size * along, rtol=1e-7, atol=1e-10)
            if known and record.trials == 1:
                first += 1
                np.testing.assert_allclose(before - x.detach().numpy(), d, rtol=1e-7, atol=1e-10)
            last = before, g
        assert first >= 8
        assert pairs(outer) == len(known)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function from which on no step looks at past ones."""
    yield lambda: monkeypatch.setattr(Secants, "apply", staticmethod(lambda *_: False))


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_function_is_minimized_faster(loss: str, direction: str, without: Callable[[], None]) -> None:
    """Each step is one that a search has certified, so f never rises; 3 starts."""
    f, ends = LOSSES[loss], list[list[float]]()
    for _ in range(2):
        ends.append([])
        for seed in range(3):
            x, values = start(seed), list[float]()
            outer = direct(x, direction=direction)
            values += [float(outer.step(lambda x=x: f(x))) for _ in range(40)]
            ends[-1].append(f(x).item())
            if len(ends) == 1:
                assert all(after <= before + 1e-14 for before, after in itertools.pairwise([*values, ends[-1][-1]]))
        without()
    least = {"quadratic": 0.0, "rosenbrock": 0.0, "logistic": 0.632567018427}[loss]
    assert all(new - least < 0.7 * (old - least) + 1e-9 for new, old in zip(*ends, strict=True))


def samples(x: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(40, 12, generator=generator, dtype=torch.float64)
    counted = itertools.count()

    def step(outer: BiSLS) -> Any:
        weights = drawn[next(counted)]
        return outer.step(lambda: (weights * SLOPES * (x - 1.0) ** 2).sum())

    return step  # type: ignore[return-value]


UNCHANGED: dict[str, tuple[dict[str, Any], bool]] = {
    "other samples": ({}, True),
    "other samples, adam": ({"direction": "adam"}, True),
    "certified": ({"momentum": False}, False),
    "the mean": ({"momentum": True}, False),
    "rare searches": ({"pace": "auto"}, False),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_nothing_is_new_where_it_does_not_apply(name: str, without: Callable[[], None]) -> None:
    """To the bit."""
    options, drawn = UNCHANGED[name]
    ends = []
    for _ in range(2):
        x = start()
        outer = direct(x, **options)
        step: Any = samples(x) if drawn else lambda outer, x=x: outer.step(lambda: rosenbrock(x))
        for _ in range(25):
            step(outer)
        ends.append(x.detach())
        without()
    assert torch.equal(*ends)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_nothing_is_new_above_a_lower_level(direction: str, without: Callable[[], None]) -> None:
    """Also where that is solved in each iteration."""
    ends = []
    for _ in range(2):
        point = random_qb(3).instance()
        inner = lower_search(point.y)
        outer = BiSLS([point.x], lower=inner, direction=direction)
        for _ in range(15):
            iterate(inner, outer, point, 40)
        assert "secants" not in outer.state
        ends.append(point.x.detach())
        without()
    assert torch.equal(*ends)


def test_another_function_ends_it() -> None:
    """The pairs are of the old one."""
    x = start()
    outer = direct(x)
    for _ in range(6):
        outer.step(lambda: rosenbrock(x))
    assert pairs(outer) == 5
    for k in range(30):
        outer.step(lambda k=k: quadratic(x - k % 3))
        assert pairs(outer) == 0 or k == 0
    state: Any = outer.state
    saved = state["secants"]
    assert saved["differing"] > 1e-3 * saved["decreases"]


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("search", [None, SLS()])
def test_a_run_that_is_resumed_goes_on_to_the_bit(direction: str, search: Any) -> None:
    x, options = start(), {"direction": direction, "search": search}
    outer = direct(x, **options)
    for _ in range(9):
        outer.step(lambda: rosenbrock(x))
    other = x.detach().clone().requires_grad_()
    resumed = direct(other, **options)
    resumed.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert plain(resumed.state_dict()) == plain(outer.state_dict())
    for _ in range(9):
        outer.step(lambda: rosenbrock(x))
        resumed.step(lambda: rosenbrock(other))
    assert pairs(outer) > 9
    assert torch.equal(x, other)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("project", [Box(-0.5, 0.5), Ball(1.0), lambda tensors: Box(-0.5, 0.5)(tensors)])
def test_a_convex_set(project: Any, direction: str) -> None:
    """f never rises, and ends where a projected step moves nothing."""
    x = start()
    outer, values = direct(x, direction=direction, project=project), list[float]()

    def loss() -> Tensor:
        return quadratic(x - 1.0) + 0.1 * (x.sum() - 3.0) ** 2

    with torch.no_grad():
        project([x])
    for _ in range(200):
        values.append(float(outer.step(loss)))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))
    assert values[40] - values[-1] < 1e-4  # 1e-3 where entries that the box holds count
    (h,) = torch.autograd.grad(loss(), x)
    moved = [(x - 0.1 * h).detach()]
    project(moved)
    assert float((moved[0] - x.detach()).norm()) < 1e-3


def test_groups_and_a_schedule() -> None:
    """A group with a smaller lr, one that stands still, and a factor of all: f never rises."""
    x, y, z = start(0), start(1), start(2)
    still = z.detach().clone()
    groups = [{"params": [x], "lr": 1.0}, {"params": [y], "lr": 0.1}, {"params": [z], "lr": 0.0}]
    outer = BiSLS(groups, hypergradient="direct")
    schedule = torch.optim.lr_scheduler.StepLR(outer, 10, 0.5)
    values = []
    for _ in range(40):
        values.append(float(outer.step(lambda: quadratic(x - y) + quadratic(y) + quadratic(z))))
        schedule.step()
    assert pairs(outer) > 20
    assert all(after < before for before, after in itertools.pairwise(values))
    assert torch.equal(z, still)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_at_a_solution_in_single_precision(direction: str) -> None:
    """Steps whose decrease rounding hides say nothing of curvature: f stays there, and no search fails."""
    x = start().detach().float().requires_grad_()
    outer, values = direct(x, direction=direction), list[float]()
    for _ in range(120):
        values.append(float(outer.step(lambda: 1.0 + logistic(x.double()).float())))
        record: Any = outer.record
        assert record.outcome in (Outcome.kept, Outcome.accepted)
    assert max(values[60:]) <= min(values) * (1.0 + 1e-5)
