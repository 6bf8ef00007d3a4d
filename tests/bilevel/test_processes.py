"""Processes that step together: bit-equal to each other, and equal to one process with the data of all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import OptionError, ProcessError
from adaptive_bilevel.hypergradient import CG, Identity, Implicit, Lanczos, Neumann, assign, check, implicit
from tests.processes import WORLD, results_of

Run = Callable[[list[int], str], list[Tensor]]
"""From the shares of the data (one for each process) and how modules are wrapped, to the tensors of the end."""


class Problem:
    """A feature map x above a small network y. Its losses are means over shares, which may have different sizes."""

    def __init__(self, shares: list[int], wrapped: str, sizes: tuple[int, ...] = (8, 8), poison: int = -1) -> None:
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


def steps_below(make: Callable[..., Any], **sizes: Any) -> Run:
    def run(shares: list[int], wrapped: str) -> list[Tensor]:
        problem = Problem(shares, wrapped, **sizes)
        optimizer = make(problem.y)
        for k in range(10):
            optimizer.step(partial(problem.lower, k))
        return problem.tensors

    return run


def steps_above(
    make: Callable[..., Any], below: Callable[..., Any], solver: Any = None, products: str = "auto", **sizes: Any
) -> Run:
    solver = Lanczos(4) if solver is None else solver

    def run(shares: list[int], wrapped: str) -> list[Tensor]:
        problem = Problem(shares, wrapped, **sizes)
        inner = below(problem.y)
        outer = make(problem.x, inner, solver)
        for k in range(10):
            for j in range(2):
                inner.step(partial(problem.lower, 2 * k + j))
            upper, lower = partial(problem.upper, k), partial(problem.lower, 2 * k + 1)
            h = implicit(upper, lower, problem.x, problem.y, solver, products=products)
            assign(problem.x, h)
            outer.step(partial(problem.upper, k))
        return problem.tensors

    return run


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
    "SLS": steps_below(SLS),
    "SLSB": steps_below(SLSB),
    "SPSB": steps_below(SPSB),
    "AutoSLS": steps_below(AutoSLS),
    "BiSPS": steps_above(lambda x, inner, _: BiSPS(x, lower=inner), SPSB),
    "BiSLS": steps_above(searched(), SLS),
    "BiSLS Adam": steps_above(searched(direction="adam", carry=True), SLS),
    "BiSLS CG": steps_above(searched(momentum=False), SLS, CG(5)),
    "BiSLS Neumann": steps_above(searched(carry=False), SLS, Neumann(3)),
    "BiSLS Identity": steps_above(searched(), SLS, Identity(0.1)),
    "OneStepBiSLS": steps_above(lambda x, inner, _: OneStepBiSLS(x, lower=inner), SLS),
    "uneven": steps_above(searched(), SLS, sizes=(8, 3)),
    "NaN below": steps_above(searched(), SLS, poison=8),
    "NaN above": steps_above(searched(), SLS, poison=5),
    "differences": steps_above(searched(products="difference"), SLS, products="difference"),
    "no_sync": accumulated,
    "check": checked,
}
CLOSE = {"differences": 1e-4}
WRAPPED = {
    name: ("plain", "lower", "both") if name in ("SLS", "BiSLS", "uneven", "no_sync") else ("plain",) for name in RUNS
}


# ------------------------------------------------------------------------------------------ what cannot go on


def fail_at(call: int, error: Exception) -> Callable[[int], str]:
    """Raise on process 1 at the call of that number, of those that a run as "BiSLS" makes."""

    def attempt(rank: int) -> str:
        problem = Problem([rank], "plain")
        if rank == 1:
            problem.failing = call, error
        inner = SLS(problem.y)
        outer = BiSLS(problem.x, lower=inner)
        before = problem.tensors
        try:
            for k in range(3):
                before = problem.tensors
                inner.step(partial(problem.lower, k))
                before = problem.tensors
                assign(problem.x, implicit(lambda: problem.upper(0), partial(problem.lower, k), problem.x, problem.y))
                outer.step(lambda: problem.upper(0))
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors, strict=True))
        return ""

    return attempt


def other_form(rank: int) -> str:
    SLS([torch.zeros(2 + rank, requires_grad=True)]).step(lambda: torch.zeros((), requires_grad=True))
    return ""


def other_value(rank: int) -> str:
    x = torch.full((2,), float(rank), requires_grad=True)
    SLS([x]).step(lambda: x.square().sum())
    return ""


def on_its_own(rank: int) -> str:
    """Parameters of its own, which may differ, and steps of its own."""
    x = torch.full((2,), 1.0 + rank, requires_grad=True)
    optimizer = SLS([x])
    optimizer.process_group = "alone"
    for _ in range(2 + rank):
        optimizer.step(lambda: (rank + 1.0) * x.square().sum())
    y = x.detach().clone().requires_grad_()
    own = implicit(lambda: x.sum() + y.sum(), lambda: (y**2 - x * y).sum(), [x], [y], process_group="alone")
    outer = BiSLS([x], hypergradient=Implicit())
    outer.process_group = "alone"
    for _ in range(1 + rank):
        outer.step(lambda y: (y + x - rank).square().sum(), lower=(y, lambda y: (y**2 - x * y).sum()))
    return f"{x.tolist()} {own}"


def in_a_group(rank: int) -> str:
    group = distributed.new_group([0, 1])
    x = torch.ones(2, requires_grad=True)
    optimizer = SLS([x])
    optimizer.process_group = group
    optimizer.step(lambda: (rank + 1.0) * x.square().sum())
    distributed.destroy_process_group(group)
    try:
        optimizer.step(lambda: x.square().sum())
    except ProcessError as error:
        return f"{x.tolist()} {str(error).partition(':')[2].partition(',')[0]}"
    return ""


def trial_that_fails(rank: int) -> str:
    """On one process, where the step is long: it is rejected on both."""
    x = torch.tensor([3.0], requires_grad=True)

    def closure() -> Tensor:
        if rank == 1 and float(x.detach()) < 0.0:
            raise FloatingPointError("below zero")
        return x.square().sum()

    optimizer = SLS([x], lr=4.0)
    optimizer.step(closure)
    return f"{x.tolist()} {optimizer.record}"


def _said(run: Callable[[], Any], rank: int) -> str:
    return str(run())


def in_parts(rank: int) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    part = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    whole = torch.ones(4, requires_grad=True)
    attempts: list[Callable[[], Any]] = [
        lambda: SLS([part]),
        lambda: BiSLS([part], lower=SLS([whole])),
        lambda: BiSLS([whole], lower=torch.optim.SGD([part], lr=0.1)),
        lambda: implicit(lambda: whole.sum(), lambda: whole.sum(), [whole], [part]),
    ]
    return str(sum("DTensor" in outcome_of(partial(_said, run), rank) for run in attempts))


FAILURES: dict[str, Callable[[int], str]] = {
    **{f"call {n}": fail_at(n, RuntimeError("boom")) for n in (1, 2, 4, 5, 6, 8)},
    "shape": other_form,
    "value": other_value,
    "alone": on_its_own,
    "group": in_a_group,
    "trial": trial_that_fails,
    "sharded": in_parts,
}


def outcome_of(attempt: Callable[[int], str], rank: int) -> str:
    try:
        return attempt(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int) -> Any:
    found = {(name, way): [t.tolist() for t in run([rank], way)] for name, run in RUNS.items() for way in WRAPPED[name]}
    return found, {name: outcome_of(attempt, rank) for name, attempt in FAILURES.items()}


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    return results_of(work)


@pytest.mark.parametrize("name", RUNS)
def test_processes_are_one(name: str, processes: list[Any]) -> None:
    """Bit-equal to each other, and to rounding equal to one process that has the data of both."""
    (one, _), (two, _) = processes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = RUNS[name]([0, 1], "plain")
    for way in WRAPPED[name]:
        assert one[name, way] == two[name, way], way
        for found, tensor in zip(one[name, way], expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), tensor, rtol=0.0, atol=CLOSE.get(name, 1e-8))


@pytest.mark.parametrize("name", [name for name in FAILURES if name.startswith("call")])
def test_an_error_of_one_is_one_of_all(name: str, processes: list[Any]) -> None:
    first, second = (failures[name] for _, failures in processes)
    assert second == "RuntimeError: boom"
    assert first.startswith("ProcessError: ")
    assert "process 1 raised RuntimeError: boom" in first


@pytest.mark.parametrize(
    ("name", "told"), [("shape", "tensor 0 is torch.float64 of shape (2,) on process 0"), ("value", "different values")]
)
def test_parameters_that_differ(name: str, told: str, processes: list[Any]) -> None:
    for _, failures in processes:
        assert failures[name].startswith("ProcessError: ")
        assert told in failures[name]
        assert "process_group" in failures[name]


def test_groups(processes: list[Any]) -> None:
    (_, one), (_, two) = processes
    assert one["alone"] != two["alone"]
    assert "Error" not in one["alone"] + two["alone"]
    one["group"], two["group"] = (re.sub("0x[0-9a-f]+", "", found["group"]) for found in (one, two))
    assert one["group"] == two["group"]
    assert "the group is gone" in one["group"]
    with pytest.raises(OptionError, match="process_group='world' must be"):
        SLS([torch.zeros(1, requires_grad=True)]).process_group = "world"


def test_parameters_in_parts_are_refused(processes: list[Any]) -> None:
    assert [failures["sharded"] for _, failures in processes] == ["4", "4"]


def test_a_trial_that_one_process_cannot_compute(processes: list[Any]) -> None:
    (_, one), (_, two) = processes
    assert one["trial"] == two["trial"]
    assert "Error" not in one["trial"]
