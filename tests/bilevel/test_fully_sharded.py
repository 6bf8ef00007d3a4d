"""Parameters in parts (`fully_shard`): equal on all processes, and to one process with the data of all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, Box
from adaptive_bilevel.hypergradient import CG, Lanczos, check, implicit
from tests.bilevel import loops
from tests.bilevel.loops import Run
from tests.processes import results_of, told


class Penalized(nn.Module):
    """Layers with a sum of squares of their parameters, which is computed where they are whole."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(features), torch.stack([p.square().sum() for p in self.parameters()]).sum()


class Stacked(nn.Module):
    """Layers one after another, and the sum of what they add."""

    def __init__(self, *layers: Penalized) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        penalties = []
        for layer in self.layers:
            features, penalty = layer(features)
            penalties.append(penalty)
        return features, torch.stack(penalties).sum()


class Problem:
    """A feature map x above a small network y; no dimension is divisible by four, and some parts are empty.

    Args:
        shares: Of the data.
        sharded: "", "lower", "upper" or "both"; "both, copied": each half of the processes has all parts; "lower,
            nested": the layers of the network, too.
        linear: Whether the network has one layer, so that the lower loss is convex.
    """

    sizes = (8, 8, 8, 3)

    def __init__(self, shares: list[int], sharded: str = "", linear: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.outer = Penalized(nn.Linear(3, 3))
            first = [] if linear else [Penalized(nn.Linear(3, 5), nn.Tanh())]
            self.inner = Stacked(*first, Penalized(nn.Linear(3 if linear else 5, 1)))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")) if "copied" in sharded else None
        if "nested" in sharded:
            for layer in self.inner.layers:
                fully_shard(layer)
        if "lower" in sharded or "both" in sharded:
            fully_shard(self.inner, mesh=mesh)
        if "upper" in sharded or "both" in sharded:
            fully_shard(self.outer, mesh=mesh)
        self.x, self.y = list(self.outer.parameters()), list(self.inner.parameters())
        self.shares = shares

    def batch(self, share: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * share + seed)
        features = torch.randn(self.sizes[share], 3, generator=generator)
        return features, features.sum(1, keepdim=True).sin() + 0.1 * share

    def fit(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        losses = []
        for share in self.shares:
            features, target = self.batch(share, seed)
            features, above = self.outer(features)
            found, below = self.inner(features)
            losses.append((found - target).square().mean())
        return torch.stack(losses).mean(), above, below

    def lower(self, seed: int) -> Tensor:
        fit, _, penalty = self.fit(seed)
        return fit + 0.01 * penalty

    def upper(self, seed: int) -> Tensor:
        fit, penalty, _ = self.fit(500 + seed)
        return fit + 0.001 * penalty

    @property
    def tensors(self) -> list[Tensor]:
        return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in (*self.x, *self.y)]


below = partial(loops.steps_below, Problem)
above = partial(loops.steps_above, Problem, products="difference")


def searched(**options: Any) -> Callable[..., Any]:
    return lambda x, inner, solver: BiSLS(x, lower=inner, solver=solver, products="difference", **options)


def estimated(shares: list[int], sharded: str) -> list[Tensor]:
    """`implicit`, and the reference of `check`."""
    problem = Problem(shares, sharded, linear=True)
    upper, lower = partial(problem.upper, 0), partial(problem.lower, 0)
    x, y = problem.x, problem.y
    h = implicit(upper, lower, x, y, Lanczos(3), products="difference")
    full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in h]
    report = check(upper, lower, x, y, gradient=h)
    return [*full, torch.tensor([one.measured for one in report.directions])]


RUNS: dict[str, Run] = {
    "SLS": below(SLS),
    "SLS Adam": below(partial(SLS, direction="adam")),
    "SLSB": below(SLSB),
    "SPSB": below(SPSB),
    "AutoSLS": below(AutoSLS),
    "BiSPS": above(lambda x, inner, _: BiSPS(x, lower=inner), SPSB),
    "BiSLS": above(searched(), SLS),
    "BiSLS Adam": above(searched(direction="adam", carry=True), partial(SLS, direction="adam")),
    "implicit and check": estimated,
    "BiSLS CG": above(searched(momentum=False), AutoSLS, CG(5)),
}
"""Products are differences in all processes, so that what is compared is the parts."""
SHARDED = {name: ("lower", "both") for name in RUNS} | {"BiSLS": ("lower", "lower, nested", "upper", "both")}
COPIED = ("both, copied",)
"""With four processes only."""


# ------------------------------------------------------------------------------------------ what cannot be done


def refused(rank: int) -> dict[str, str]:
    problem, inner = Problem([rank], "both"), Problem([rank], "lower")
    x, y, upper, lower = problem.x, problem.y, partial(problem.upper, 0), partial(problem.lower, 0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    summed = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    alone = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
    lonely = SLS(y)
    lonely.process_group = "alone"
    found = {
        "placements": told(lambda: SLS([summed])),
        "no module": told(lambda: SLS([alone]).step(lambda: cast(Any, alone.square().sum()).full_tensor())),
        "autograd": told(lambda: BiSLS(inner.x, lower=SLS(inner.y), products="autograd")),
        "implicit": told(lambda: implicit(upper, lower, x, y, products="autograd")),
        "project": told(lambda: BiSLS(x, lower=SLS(y), project=Box(0.0, 1.0))),
        "group": told(lambda: lonely.step(lower)),
    }
    cast(Any, problem.inner).set_requires_gradient_sync(False)
    found["no sync"] = told(lambda: SLS(y).step(lower))
    return found


REFUSED = {
    "placements": "TensorError: SLS: a parameter of shape (4,) is a DTensor with placements",
    "no module": "TensorError: a parameter of shape (5,) is a DTensor of no fully_shard module",
    "autograd": "OptionError: BiSLS(products='autograd'): parameters in parts",
    "implicit": "OptionError: implicit(products='autograd'): parameters in parts",
    "project": "OptionError: BiSLS(project=Box(low=0.0, high=1.0)): upper parameters are in parts",
    "group": "ProcessError: process_group: 1 processes step together, and a parameter of shape (5, 3) is in parts over",
    "no sync": "ClosureError: the closure runs a fully_shard module under set_requires_gradient_sync(False)",
}


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "text": lambda loss: "loss",
    "vector": lambda loss: loss * torch.ones(2),
    "number": lambda loss: loss.item(),
}
FAILING = {
    ("step", "after"): 1,
    ("step", "before"): 1,
    ("trial", "before"): 2,
    ("trial", "after"): 2,
    ("upper loss", "before"): 1,
    ("first gradient", "before"): 2,
    ("product", "before"): 3,
    ("product", "after"): 3,
    ("step", "between"): 1,
    ("trial", "between"): 2,
    ("step on x", "before"): 1,
    ("step on x", "after"): 1,
    ("own backward", "after"): 1,
}
"""Where a closure raises on process 1, whether before, between or after its modules run, and at which call."""


def returns(other: Callable[[Tensor], Any], rank: int) -> str:
    """A closure that returns something else than a loss, on process 1."""
    problem = Problem([rank], "lower")
    before, optimizer = problem.tensors, SLS(problem.y)

    def closure() -> Any:
        loss = problem.lower(0)
        return other(loss) if rank == 1 else loss

    said = told(lambda: optimizer.step(closure))
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors, strict=True))
    return said


def fails(rank: int, where: str, when: str, call: int) -> str:
    """A closure that raises at a call, on process 1; then it does not."""
    problem = Problem([rank], "both" if when == "between" else "lower")
    before, calls = problem.tensors, 0
    optimizer = SLS(problem.x if where == "step on x" else problem.y)

    def closure(loss: Callable[[int], Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        broken = rank == 1 and calls == call
        if broken and when == "between":
            problem.outer(torch.ones(2, 3))
        if broken and when != "after":
            raise RuntimeError("boom")
        found = loss(0)
        if broken:
            raise RuntimeError("boom")
        if where == "own backward" and found.requires_grad:
            found.backward()
        return found

    lower, upper = partial(closure, problem.lower), partial(closure, problem.upper)
    attempt: Callable[[], Any] = partial(implicit, upper, lower, problem.x, problem.y, Lanczos(2))
    if where not in ("upper loss", "first gradient", "product"):
        attempt = partial(optimizer.step, lower)
    said = told(attempt)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors, strict=True))
    attempt()
    return said


FEW: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"SLS": ("lower",), "SPSB": ("both",), "BiSLS": ("lower, nested", "upper"), "BiSLS Adam": ("both",)},
    4: {"SLS Adam": COPIED, "BiSLS Adam": ("both",)},
}
"""What runs without --slow, by number of processes."""


def work(every: bool, rank: int) -> Any:
    count = torch.distributed.get_world_size()
    chosen = {name: (*kinds, *COPIED[: count // 4]) for name, kinds in SHARDED.items()} if every else FEW[count]
    runs = [(name, what) for name, kinds in chosen.items() for what in kinds]
    found = {(name, what): [t.tolist() for t in RUNS[name]([rank], what)] for name, what in runs}
    others = {name: returns(other, rank) for name, other in OTHERS.items()}
    return found, refused(rank), {of: fails(rank, *of, call) for of, call in FAILING.items()}, others


SLOW = pytest.mark.slow


REPEATED = [pytest.param(of, marks=SLOW) for of in ((4, False), (2, True), (4, True))]


@pytest.fixture(scope="module", params=[(2, False), *REPEATED])
def processes(request: Any) -> list[Any]:
    count, every = request.param
    return results_of(partial(work, every), count)


def test_parts_are_whole(processes: list[Any]) -> None:
    first = processes[0][0]
    for name in {name for name, _ in first}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = RUNS[name](list(range(len(processes))), "")
        for what in (what for kind, what in first if kind == name):
            assert all(found[name, what] == first[name, what] for found, *_ in processes), (name, what)
            for found, tensor in zip(first[name, what], expected, strict=True):
                torch.testing.assert_close(torch.tensor(found), tensor, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, processes: list[Any]) -> None:
    for _, said, *_ in processes:
        assert said[name].startswith(REFUSED[name])


@pytest.mark.parametrize("of", FAILING, ids=" ".join)
def test_an_error_of_one_is_one_of_all(of: tuple[str, str], processes: list[Any]) -> None:
    assert processes[1][2][of] == "RuntimeError: boom"
    for rank, (*_, said, _) in enumerate(processes):
        assert rank == 1 or "process 1 raised RuntimeError: boom" in said[of]


@pytest.mark.parametrize("name", OTHERS)
def test_no_loss_on_one_is_an_error_of_all(name: str, processes: list[Any]) -> None:
    for rank, (*_, said) in enumerate(processes):
        assert said[name].startswith(
            "ClosureError: the closure returned" if rank == 1 else "ProcessError: this process"
        )
        assert "return" in said[name] and (rank == 1 or "process 1 raised ClosureError" in said[name])
