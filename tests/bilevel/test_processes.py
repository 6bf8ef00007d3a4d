"""Processes that step together: bit-equal to each other, and equal to one process with the data of all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.hypergradient import CG, Identity, Neumann, assign, check, implicit
from adaptive_bilevel.policies import Outcome
from tests.bilevel import loops
from tests.bilevel.loops import Run
from tests.processes import results_of


class Problem:
    """A feature map x above a small network y. Its losses are means over shares, which may have different sizes."""

    def __init__(
        self, shares: list[int], wrapped: str, sizes: tuple[int, ...] = (8, 8, 8, 8), poison: int = -1
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.outer = nn.Linear(3, 3)
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.x, self.y = list(self.outer.parameters()), list(self.inner.parameters())
        distribute = nn.parallel.DistributedDataParallel
        self.up: Any = distribute(self.outer) if wrapped == "both" else self.outer
        self.down: Any = distribute(self.inner) if wrapped in ("lower", "both") else self.inner
        self.shares, self.sizes, self.poison, self.calls = shares, sizes, poison, 0
        self.failing: tuple[int, Exception | None] = 0, None

    def batch(self, share: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * share + seed)
        features = torch.randn(self.sizes[share], 3, generator=generator)
        return features, features.sum(1, keepdim=True).sin() + 0.1 * share

    def fit(self, seed: int) -> Tensor:
        losses = []
        for share in self.shares:
            features, target = self.batch(share, seed)
            losses.append((self.down(self.up(features)) - target).square().mean())
        self.calls += 1
        call, error = self.failing
        if error is not None and self.calls == call:
            raise error
        if self.calls == self.poison and 1 in self.shares:
            losses.append(losses[0] * torch.nan)
        return torch.stack(losses).mean()

    def lower(self, seed: int) -> Tensor:
        return self.fit(seed) + 0.01 * sum(p.square().sum() for p in self.y)

    def upper(self, seed: int) -> Tensor:
        return self.fit(500 + seed) + 0.001 * sum(p.square().sum() for p in self.x)

    @property
    def tensors(self) -> list[Tensor]:
        return [p.detach().clone() for p in (*self.x, *self.y)]


below = partial(loops.steps_below, Problem)
above = partial(loops.steps_above, Problem)


def accumulated(shares: list[int], wrapped: str) -> list[Tensor]:
    """Two backwards in a closure, the first under ``no_sync``."""
    problem = Problem(shares, wrapped)
    optimizer = SLS(problem.y)

    def closure(k: int) -> Tensor:
        with problem.down.no_sync() if wrapped == "lower" else nullcontext():
            first = problem.lower(2 * k) / 2
            if first.requires_grad:
                first.backward()
        second = problem.lower(2 * k + 1) / 2
        if second.requires_grad:
            second.backward()
        return (first + second).detach()

    for k in range(5):
        optimizer.step(partial(closure, k))
    return problem.tensors


def gone_back(shares: list[int], wrapped: str) -> list[Tensor]:
    """The upper loss of the tenth step is high, except at points where earlier steps began."""
    problem = Problem(shares, wrapped)
    inner = SLS(problem.y)
    outer = BiSLS(problem.x, lower=inner, carry=False)
    points: list[list[Tensor]] = []

    def upper(k: int) -> Tensor:
        there = any(all(map(torch.equal, problem.tensors[:2], point[:2])) for point in points)
        return problem.upper(0) + (0.0 if k != 9 or there else 1e3)

    for k in range(12):
        inner.step(partial(problem.lower, 0))
        assign(problem.x, implicit(partial(upper, k), partial(problem.lower, 0), problem.x, problem.y))
        here = problem.tensors
        outer.step(partial(upper, k))
        assert outer.record is not None and (outer.record.outcome == Outcome.returned) == (k == 9)
        points.append(here)
    return problem.tensors


def searched(**options: Any) -> Callable[..., Any]:
    return lambda x, inner, solver: BiSLS(x, lower=inner, solver=solver, **options)


def checked(shares: list[int], wrapped: str) -> list[Tensor]:
    """The reference of `check`, on a lower problem that is a quadratic."""
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def lower() -> Tensor:
        return torch.stack([((1.0 + a) * y.square() + y.prod() - (x + a).square() * y).sum() for a in shares]).mean()

    def upper() -> Tensor:
        return torch.stack([(y - 1.0 - a).square().sum() + a * x.square().sum() for a in shares]).mean()

    report = check(upper, lower, [x], [y], gradient=[torch.ones(2)])
    return [torch.tensor([one.measured for one in report.directions]), *implicit(upper, lower, [x], [y])]


RUNS: dict[str, Run] = {
    "SLS": below(SLS),
    "SLSB": below(SLSB),
    "SPSB": below(SPSB),
    "AutoSLS": below(AutoSLS),
    "BiSPS": above(lambda x, inner, _: BiSPS(x, lower=inner), SPSB),
    "BiSLS": above(searched(), SLS),
    "BiSLS Adam": above(searched(direction="adam", carry=True), SLS),
    "BiSLS CG": above(searched(momentum=False), SLS, CG(5)),
    "BiSLS Neumann": above(searched(carry=False), SLS, Neumann(3)),
    "BiSLS Identity": above(searched(), SLS, Identity(0.1)),
    "OneStepBiSLS": above(lambda x, inner, _: OneStepBiSLS(x, lower=inner), SLS),
    "uneven": above(searched(), SLS, sizes=(8, 3, 5, 8)),
    "NaN below": above(searched(), SLS, poison=8),
    "NaN above": above(searched(), SLS, poison=5),
    "differences": above(searched(products="difference"), SLS, products="difference"),
    "gone back": gone_back,
    "no_sync": accumulated,
    "check": checked,
}
CLOSE = {"differences": 1e-4}
WRAPPED = {
    name: ("plain", "lower", "both") if name in ("SLS", "BiSLS", "uneven", "gone back", "no_sync") else ("plain",)
    for name in RUNS
}


def work(rank: int) -> Any:
    return {(name, way): [t.tolist() for t in run([rank], way)] for name, run in RUNS.items() for way in WRAPPED[name]}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: Any) -> list[Any]:
    return results_of(work, request.param)


@pytest.mark.parametrize("name", RUNS)
def test_processes_are_one(name: str, processes: list[Any]) -> None:
    """Bit-equal to each other, and to rounding equal to one process that has the data of all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = RUNS[name](list(range(len(processes))), "plain")
    for way in WRAPPED[name]:
        first = processes[0][name, way]
        assert all(own[name, way] == first for own in processes), way
        for found, tensor in zip(first, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), tensor, rtol=0.0, atol=CLOSE.get(name, 1e-8))
