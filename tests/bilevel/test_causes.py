"""Errors inside of wrapped modules and of backwards, while the other process waits in an exchange of torch's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from adaptive_bilevel import SLS
from adaptive_bilevel.evaluation import causes
from adaptive_bilevel.hypergradient import Lanczos, implicit
from tests.processes import end, results_of

LIMIT = 2.0  # seconds


class Breaking(nn.Module):
    """The identity, which raises at one call of its forward, or in the backward of that; it counts calls.

    Args:
        where: "forward" or "backward".
        call: The number of the call; 0: never.
    """

    seen: Tensor

    def __init__(self, where: str, call: int) -> None:
        super().__init__()
        self.where, self.call, self.calls = where, call, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1.0
        if self.calls == self.call:
            if self.where == "forward":
                raise RuntimeError("boom")
            features.register_hook(self.fail)
        return features

    def fail(self, _: Tensor) -> None:
        raise RuntimeError("boom")


class Problem:
    """A feature map x above a network y of three layers, wrapped over a group with a short limit of its own.

    Args:
        wrapped: "replicated", "replicated with buffers", "in parts" or "in parts, nested" (the layers, too).
        where: See `Breaking`.
        call: See `Breaking`, of process 1.
        rank: The number of the process.
    """

    def __init__(self, wrapped: str, where: str, call: int, rank: int) -> None:
        torch.manual_seed(0)
        self.group = distributed.new_group(list(range(2)), timeout=timedelta(seconds=LIMIT))
        self.outer = nn.Linear(3, 3)
        breaking = Breaking(where, call if rank == 1 else 0)
        first = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        inner = nn.Sequential(first, breaking, nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 1))
        self.model: Any = inner
        if "replicated" in wrapped:
            buffers = "buffers" in wrapped
            self.model = nn.parallel.DistributedDataParallel(
                inner, process_group=self.group, broadcast_buffers=buffers, bucket_cap_mb=1e-6
            )
        else:
            mesh = DeviceMesh.from_group(self.group, "cpu")
            for layer in inner if "nested" in wrapped else ():
                if list(layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(inner, mesh=mesh)
        self.x, self.y = list(self.outer.parameters()), list(self.model.parameters())
        self.features = torch.randn(8, 3, generator=torch.Generator().manual_seed(rank))

    def lower(self) -> Tensor:
        return self.model(self.outer(self.features) + 0.1 * torch.randn(8, 3)).square().mean()

    def step(self) -> None:
        optimizer = SLS(self.y)
        optimizer.process_group = self.group
        optimizer.step(self.lower)

    def own(self) -> None:
        """A step along the gradient of a backward of the closure's own."""

        def closure() -> Tensor:
            loss = self.lower()
            if loss.requires_grad:
                loss.backward()
            return loss

        optimizer = SLS(self.y)
        optimizer.process_group = self.group
        optimizer.step(closure)

    def implicit(self) -> None:
        implicit(self.lower, self.lower, self.x, self.y, Lanczos(2), products="difference", process_group=self.group)

    @property
    def state(self) -> list[Tensor]:
        held = [*self.x, *self.y, *self.model.buffers()]
        return [*(getattr(t, "_local_tensor", t).detach().clone() for t in held), torch.get_rng_state()]

    def late(self) -> None:
        """A later step, at which process 1 raises before the module runs."""
        optimizer = SLS(self.y)
        optimizer.process_group = self.group

        def closure() -> Tensor:
            if distributed.get_rank() == 1:
                raise RuntimeError("boom")
            return self.lower()

        optimizer.step(closure)

    def absent(self) -> None:
        """A step that process 1 leaves out."""
        if distributed.get_rank() == 0:
            self.step()


Case = tuple[str, str, int, Callable[[Problem], None]]
"""How modules are wrapped; where and at which call process 1 raises; what is done."""
CASES: dict[str, Case] = {
    "replicated, forward": ("replicated with buffers", "forward", 1, Problem.step),
    "replicated, backward": ("replicated", "backward", 1, Problem.step),
    "in parts, forward": ("in parts, nested", "forward", 1, Problem.step),
    "in parts, product": ("in parts, nested", "backward", 4, Problem.implicit),
    "replicated, later": ("replicated", "forward", 0, Problem.late),
}
MORE: dict[str, Case] = {
    "replicated, own backward": ("replicated", "backward", 1, Problem.own),
    "replicated, product": ("replicated", "backward", 4, Problem.implicit),
    "replicated with buffers, backward": ("replicated with buffers", "backward", 1, Problem.step),
    "in parts, one module, forward": ("in parts", "forward", 1, Problem.step),
    "in parts, one module, backward": ("in parts", "backward", 1, Problem.step),
    "in parts, backward": ("in parts, nested", "backward", 1, Problem.step),
    "in parts, own backward": ("in parts, nested", "backward", 1, Problem.own),
    "in parts, trial": ("in parts, nested", "forward", 2, Problem.step),
}
AT_ONCE = ("replicated, forward", "in parts, one module, forward")
"""No exchange of torch's follows before the next one of this package."""


def work(case: Case, rank: int) -> tuple[str, str, float, bool]:
    """Return what is said, and torch's error; after how many seconds, and whether all is as before."""
    wrapped, where, call, attempt = case
    problem = Problem(wrapped, where, call, rank)
    if attempt is Problem.late:
        problem.step()
    before, began, said, cause = problem.state, time.monotonic(), "", ""
    try:
        attempt(problem)
    except Exception as error:
        said, cause = f"{type(error).__name__}: {error}", repr(error.__cause__)
    seconds = time.monotonic() - began
    return said, cause, seconds, all(torch.equal(a, b) for a, b in zip(before, problem.state, strict=True))


@pytest.fixture(autouse=True, scope="module")
def processes_of_this_module() -> Iterator[None]:
    """DTensor keeps meshes, and takes one of a group that has gone for an equal one of another group."""
    end()
    yield
    end()


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_others_name_the_cause(name: str) -> None:
    (first, cause, *_), (second, *_) = found = results_of(partial(work, (CASES | MORE)[name]))
    assert second == "RuntimeError: boom"
    assert first == (
        "ProcessError: this process stopped, since the processes step together and process 1 raised RuntimeError: boom"
    )
    assert torch_failed(cause) or name in AT_ONCE
    for *_, seconds, same in found:
        assert seconds < (1.0 if name in AT_ONCE else 4.0) * LIMIT  # no hang
        assert same


def torch_failed(cause: str) -> bool:
    """Whether it is what torch says of an exchange that failed, which differs by where the process had got to."""
    return any(text in cause for text in ("gloo", "Application timeout", "Connection closed"))


def test_no_process_has_left_a_cause() -> None:
    (said, cause, _, same), _ = results_of(partial(work, ("replicated", "forward", 0, Problem.absent)))
    assert said.startswith("ProcessError: the 2 processes could not exchange 4 numbers, and none has left a cause: ")
    assert torch_failed(cause) and same


def left(rank: int) -> list[str]:
    """What is found in the store of all processes: in the evaluation in which one raises, and in the next one."""
    found = []
    for error in (ValueError("one"), ValueError("two"), None):
        causes.begin(None)
        if rank == 1 and error is not None:
            causes.leave(None, error)
            causes.leave(None, RuntimeError("one more"))
        distributed.barrier()
        found.append(causes.left(None))
        distributed.barrier()
    return found


def test_a_cause_is_one_of_this_evaluation() -> None:
    assert results_of(left) == [["process 1 raised ValueError: one", "process 1 raised ValueError: two", ""]] * 2
