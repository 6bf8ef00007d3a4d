"""A lower loss that draws random numbers: hypergradient and response see the same ones, for 11 products together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit_with_info

K = 4


class Task:
    """A weighted regression by a small network."""

    def __init__(self, noise: str, levels: int = 1) -> None:
        torch.manual_seed(0)
        self.noise, self.data, self.target = noise, torch.randn(24, 5).double(), torch.randn(24, 1).double()
        self.nets = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double() for _ in range(levels)]
        self.drop = nn.Dropout(0.4)
        self.x = torch.zeros(16, dtype=torch.float64, requires_grad=True)

    def lower(self, net: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            rows = torch.randint(16, (8,)) if self.noise == "batch" else torch.arange(16)
            inputs = self.data[rows]
            if self.noise == "dropout":
                inputs = self.drop(inputs)
            elif self.noise == "noise":
                inputs = inputs + 0.3 * torch.randn_like(inputs)
            return (self.x[rows].sigmoid() * (net(inputs) - self.target[rows])[:, 0] ** 2).mean()

        return loss

    def upper(self) -> Tensor:
        sizes = [(net(self.data[16:]) - self.target[16:]).square().mean() for net in self.nets]
        return torch.stack(sizes).sum()

    def parameters(self) -> list[Tensor]:
        return [p for net in self.nets for p in net.parameters()]


@pytest.mark.parametrize("noise", ["none", "dropout", "noise", "batch"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_one_basis_serves_both(noise: str, levels: int, given: bool) -> None:
    task = Task(noise, levels)
    closures = [task.lower(net) for net in task.nets]
    inners = [SLS(net.parameters()) for net in task.nets]
    outer = BiSLS([task.x], lower=inners, solver=Lanczos(K))
    for _ in range(6):
        for inner, closure in zip(inners, closures, strict=True):
            for _ in range(3):
                inner.step(closure)
        lower = lambda: torch.stack([c() for c in closures]).sum()  # noqa: E731
        h, info = implicit_with_info(task.upper, lower, [task.x], task.parameters(), Lanczos(K))
        assign([task.x], h)
        before, state = outer.evaluations.lower.hvps, torch.get_rng_state()
        outer.step(task.upper, closures if given else None)
        assert outer.record is not None and outer.record.slope_ratio == pytest.approx(1.0, rel=1e-9)
        assert info.hvps == K and outer.evaluations.lower.hvps - before == 1
        assert torch.equal(torch.get_rng_state(), state)  # the upper loss draws none


def test_a_miss_is_evaluated_on_a_sample_all_the_same() -> None:
    task = Task("dropout")
    inner, closure = SLS(task.parameters()), task.lower(task.nets[0])
    outer = BiSLS([task.x], lower=inner, solver=Lanczos(K))
    inner.step(closure)
    for solver, products in ((Lanczos(K), 1), (Lanczos(K + 1), K + 1)):  # of another solver, it is not taken
        h, _ = implicit_with_info(task.upper, closure, [task.x], task.parameters(), solver)
        assign([task.x], h)
        before = outer.evaluations.lower.hvps
        outer.step(task.upper)
        assert outer.evaluations.lower.hvps - before == products


def test_the_random_numbers_of_the_run_are_those_of_the_users_calls() -> None:
    draws = []
    for solver in (Lanczos(K), None):
        task = Task("dropout")
        inner, closure = SLS(task.parameters()), task.lower(task.nets[0])
        outer = BiSLS([task.x], lower=inner, solver=Lanczos(K))
        for _ in range(3):
            inner.step(closure)
            if solver is None:  # a hypergradient of the user's, which draws as many numbers
                closure()
                task.x.grad = -torch.ones_like(task.x)
            else:
                assign([task.x], implicit_with_info(task.upper, closure, [task.x], task.parameters(), solver)[0])
            outer.step(task.upper)
            draws.append(torch.rand(3))
    assert torch.equal(torch.stack(draws[:3]), torch.stack(draws[3:]))
