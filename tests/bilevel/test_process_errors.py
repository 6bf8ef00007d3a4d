"""Processes that cannot go on together: an error on each, which names one of them, and parameters as before."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from adaptive_bilevel import SLS, SPSB, BiSLS
from adaptive_bilevel.errors import OptionError, ProcessError
from adaptive_bilevel.hypergradient import Implicit, Lanczos, Neumann, assign, implicit
from tests.bilevel.test_processes import Problem
from tests.processes import results_of


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


def fail_in_wrapped(when: str, rank: int) -> str:
    """Raise on process 1 in a lower step below DistributedDataParallel; then do not."""
    problem = Problem([rank], "lower")
    before, optimizer, broken = problem.tensors, SLS(problem.y), rank == 1

    def closure() -> Tensor:
        if broken and when == "before":
            raise RuntimeError("boom")
        loss = problem.lower(0)
        if broken and when == "after":
            raise RuntimeError("boom")
        if "backward" in when and loss.requires_grad and not (broken and when == "before backward"):
            loss.backward()
        if broken:
            raise RuntimeError("boom")
        return loss

    try:
        optimizer.step(closure)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors, strict=True))
        broken = False
        optimizer.step(closure)
    return ""


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


def fewer(rank: int) -> str:
    SLS([torch.zeros(2, requires_grad=True) for _ in range(2 - rank)]).step(lambda: torch.zeros((), requires_grad=True))
    return ""


def options_apart(make: Callable[[list[Tensor], int], Any], rank: int) -> str:
    x = torch.ones(2, requires_grad=True)
    optimizer = make([x], rank)
    try:
        optimizer.step(lambda: x.square().sum())
    finally:
        assert x.tolist() == [1.0, 1.0]
    return ""


def bilevel_options_apart(rank: int) -> str:
    problem = Problem([rank], "plain")
    inner = SLS(problem.y)
    outer = BiSLS(problem.x, lower=inner, solver=Lanczos(4 + rank))
    inner.step(partial(problem.lower, 0))
    assign(problem.x, problem.x)
    outer.step(partial(problem.upper, 0))
    return ""


def implicit_apart(options: Callable[[int], Any], rank: int) -> str:
    problem = Problem([rank], "plain")
    implicit(partial(problem.upper, 0), partial(problem.lower, 0), problem.x, problem.y, **options(rank))
    return ""


def generators(rank: int) -> str:
    """Each process has a generator of its own; the first one draws for all."""
    problem = Problem([rank], "plain")
    solver = Neumann(3, 0.1, random=True, generator=torch.Generator().manual_seed(rank))
    inner = SLS(problem.y)
    outer = BiSLS(problem.x, lower=inner, solver=solver)
    inner.step(partial(problem.lower, 0))
    assign(problem.x, implicit(partial(problem.upper, 0), partial(problem.lower, 0), problem.x, problem.y, solver))
    outer.step(partial(problem.upper, 0))
    return str([t.tolist() for t in problem.tensors])


def skipped(rank: int) -> str:
    """A lower step that process 1 leaves out."""
    problem = Problem([rank], "plain")
    inner, upper, lower = SLS(problem.y), partial(problem.upper, 0), partial(problem.lower, 0)
    before = problem.tensors
    try:
        for k in range(3):
            before = problem.tensors
            if (rank, k) != (1, 1):
                inner.step(lower)
            before = problem.tensors
            implicit(upper, lower, problem.x, problem.y)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors, strict=True))
    return ""


FAILURES: dict[str, Callable[[int], str]] = {
    **{f"call {n}": fail_at(n, RuntimeError("boom")) for n in (1, 2, 4, 5, 6, 8)},
    **{f"call {w}": partial(fail_in_wrapped, w) for w in ("before", "after", "before backward", "after backward")},
    "shape": other_form,
    "value": other_value,
    "alone": on_its_own,
    "group": in_a_group,
    "trial": trial_that_fails,
    "number": fewer,
    "lr": partial(options_apart, lambda x, rank: SLS(x, 0.1 + rank)),
    "direction": partial(options_apart, lambda x, rank: SPSB(x, direction=("sgd", "adam")[rank])),
    "solver": bilevel_options_apart,
    "solver of implicit": partial(implicit_apart, lambda rank: {"solver": Lanczos(3 + rank)}),
    "products of implicit": partial(implicit_apart, lambda rank: {"products": ("autograd", "difference")[rank]}),
    "generators": generators,
    "skipped": skipped,
}


def outcome_of(attempt: Callable[[int], str], rank: int) -> str:
    try:
        return attempt(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int) -> Any:
    return {name: outcome_of(attempt, rank) for name, attempt in FAILURES.items()}


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    return results_of(work)


@pytest.mark.parametrize("name", [name for name in FAILURES if name.startswith("call")])
def test_an_error_of_one_is_one_of_all(name: str, processes: list[Any]) -> None:
    first, second = (failures[name] for failures in processes)
    assert second == "RuntimeError: boom"
    assert first.startswith("ProcessError: ")
    assert "process 1 raised RuntimeError: boom" in first


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("shape", "tensor 0 is torch.float64 of shape (2,) on process 0"),
        ("value", "different values"),
        ("number", "process 0 steps 2 tensors, process 1 steps 1"),
    ],
)
def test_parameters_that_differ(name: str, told: str, processes: list[Any]) -> None:
    for failures in processes:
        assert failures[name].startswith("ProcessError: ")
        assert told in failures[name]
        assert "process_group" in failures[name]


def test_generators_of_processes(processes: list[Any]) -> None:
    one, two = processes
    assert "Error" not in one["generators"] and one["generators"] == two["generators"]


def test_groups(processes: list[Any]) -> None:
    one, two = processes
    assert one["alone"] != two["alone"]
    assert "Error" not in one["alone"] + two["alone"]
    one["group"], two["group"] = (re.sub("0x[0-9a-f]+", "", found["group"]) for found in (one, two))
    assert one["group"] == two["group"]
    assert "the group is gone" in one["group"]
    with pytest.raises(OptionError, match="process_group='world' must be"):
        SLS([torch.zeros(1, requires_grad=True)]).process_group = "world"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lr", "option lr is [0.1] on process 0 and [1.1] on process 1"),
        ("direction", "option direction is ['sgd'] on process 0 and ['adam'] on process 1"),
        ("skipped", "process 0 steps 4 tensors, process 1 steps 6. One has skipped a step"),
        ("solver", "option solver is 'Lanczos(k=4, dtype=None, device=None)' on process 0 and 'Lanczos(k=5,"),
        ("solver of implicit", "option solver is 'Lanczos(k=3, dtype=None, device=None)' on process 0"),
        ("products of implicit", "option products is 'autograd' on process 0 and 'difference' on process 1"),
    ],
)
def test_processes_that_do_not_do_the_same(name: str, told: str, processes: list[Any]) -> None:
    for failures in processes:
        assert failures[name].startswith("ProcessError: ")
        assert told in failures[name]


def test_a_trial_that_one_process_cannot_compute(processes: list[Any]) -> None:
    one, two = processes
    assert one["trial"] == two["trial"]
    assert "Error" not in one["trial"]
