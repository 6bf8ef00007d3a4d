"""Several processes: lower steps are those on the mean loss; what TorchOpt cannot do there is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from adaptive_bilevel import SLS, SPSB, BiSLS, policies
from adaptive_bilevel_torchopt import FunctionalLowerStep, LowerStep, PolyakLR, UpperStep, sls
from tests.processes import results_of, told

Batches = Sequence[tuple[Tensor, Tensor]]


class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg()):
    """Ridge regression with a penalty per weight."""

    def __init__(self, x: Tensor, rule: Any = SLS, *, alone: bool = False) -> None:
        super().__init__()
        self.x, self.y, self.alone = x, nn.Parameter(torch.zeros(3)), alone
        self.lower = LowerStep(self, rule)

    def objective(self, batches: Batches) -> Tensor:
        return objective(self.y, self.x, batches)

    def solve(self, batches: Batches) -> None:
        step = self.lower.attach()
        if self.alone and self.lower.optimizer is not None:
            self.lower.optimizer.process_group = "alone"
        for _ in range(5):
            step(lambda: self.objective(batches))


def fit(y: Tensor, batches: Batches) -> Tensor:
    return torch.stack([(a @ y - b).square().mean() for a, b in batches]).mean()


def objective(y: Tensor, x: Tensor, batches: Batches) -> Tensor:
    return fit(y, batches) + 0.1 * (x.exp() * y.square()).sum()


def data(shares: Sequence[int], seed: int) -> Batches:
    made = []
    for share in shares:
        a = torch.randn(12, 3, generator=torch.Generator().manual_seed(100 * share + seed))
        made.append((a, a.sum(1).sin() + 0.3 * share))
    return made


def solved(shares: Sequence[int], rule: Any) -> list[float]:
    x = torch.zeros(3, requires_grad=True)
    inner = Inner(x, rule)
    for k in range(2):
        inner.solve(data(shares, k))
    return inner.y.tolist()


def functional(shares: Sequence[int]) -> list[float]:
    lower = FunctionalLowerStep(objective, SLS)
    y, step = lower.attach(torch.zeros(3), torch.zeros(3), data(shares, 0))
    for _ in range(5):
        step()
    return y.tolist()


RUNS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "SLS": lambda shares: solved(shares, SLS),
    "SPSB": lambda shares: solved(shares, SPSB),
    "functional": functional,
}


def upper_steps(rank: int, alone: bool) -> list[float]:
    x = torch.zeros(3, requires_grad=True)
    inner = Inner(x, alone=alone)
    meta = UpperStep([x], lower=inner.lower)
    if alone:
        meta.optimizer.process_group = "alone"
    for k in range(1 + rank):
        inner.solve(data([rank], k))
        meta.step(lambda: fit(inner.y, data([rank], 7)))
    return x.tolist()


def refused(rank: int) -> dict[str, str]:
    whole, parts = torch.zeros(3, requires_grad=True), nn.Linear(3, 1)
    fully_shard(parts)
    params = list(parts.parameters())
    inner, sharded = Inner(whole), Inner(whole)
    sharded.y = params[0]
    functional = FunctionalLowerStep(objective, SLS)
    y = torch.zeros(3, requires_grad=True)
    outer = BiSLS([whole])
    whole.grad = torch.zeros(3)
    return {
        "upper step": told(lambda: upper_steps(0, alone=False)),
        "LowerStep": told(lambda: LowerStep(sharded)),
        "FunctionalLowerStep": told(lambda: functional.attach(params, whole, [])),
        "UpperStep": told(lambda: UpperStep(params, lower=inner.lower)),
        "init": told(lambda: sls().init(tuple(params))),
        "PolyakLR": told(lambda: PolyakLR(policies.SPSB()).tell(y.sum(), params)),
        "step(lower=)": told(lambda: outer.step(lambda y: y[0].sum(), lower=(params, lambda y: y[0].sum()))),
    }


REFUSED = {
    "upper step": "HypergradientError: UpperStep: 2 processes step together, and TorchOpt solves for the adjoint",
    **{
        name: f"TensorError: {owner}: a tensor of shape (1, 3) is a DTensor: "
        for name, owner in {
            "LowerStep": "LowerStep",
            "FunctionalLowerStep": "FunctionalLowerStep.attach",
            "UpperStep": "UpperStep",
            "init": "scale_by_sls",
            "PolyakLR": "PolyakLR.tell",
            "step(lower=)": "step(lower=(tensors, loss))",
        }.items()
    },
}


def work(rank: int) -> Any:
    runs = {name: run([rank]) for name, run in RUNS.items()}
    return runs, refused(rank), upper_steps(rank, alone=True)


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    return results_of(work)


pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize("name", RUNS)
def test_lower_steps_are_those_of_one_process(name: str, processes: list[Any]) -> None:
    one, two = (runs[name] for runs, *_ in processes)
    assert one == two
    torch.testing.assert_close(torch.tensor(one), torch.tensor(RUNS[name]([0, 1])), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, processes: list[Any]) -> None:
    for _, said, _ in processes:
        assert said[name].startswith(REFUSED[name])


def test_a_problem_of_one_process_alone(processes: list[Any]) -> None:
    for rank, (*_, found) in enumerate(processes):
        assert found == upper_steps(rank, alone=False)
