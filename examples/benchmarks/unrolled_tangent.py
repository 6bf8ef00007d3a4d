"""Searches through a differentiable inner loop: by running it again in each trial, or along its tangent.

With y_T(x) the end of the loop, F(x) = f(x, y_T(x)). A trial at x - a d costs one run of the loop, and its value is F
itself. The other way takes w = -dy_T(x) d once, in forward mode (one JVP), and compares f(x - a d, y_T(x) + a w).

    python examples/benchmarks/unrolled_tangent.py

prints what each costs in milliseconds of CPU (medians), the trials of a step, and the loss at the end of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from adaptive_bilevel import BiSLS
from adaptive_bilevel.bilevel import RoleState


class Loop(NamedTuple):
    """x, y_T as a function of x, and f as a function of y. `run(x, graph)` runs without a graph for x where it can."""

    x: list[Tensor]
    run: Callable[[list[Tensor], bool], list[Tensor]]
    val: Callable[[list[Tensor]], Tensor]


def descended(loss: Any, y: list[Tensor], rate: Any, steps: int, graph: bool) -> list[Tensor]:
    """Return y after plain steps, on a graph or each on its own; the tangents of x go through both."""
    for _ in range(steps):
        y = y if graph else [p if forward_ad.unpack_dual(p).tangent is not None else p.detach() for p in y]
        y = [p if p.requires_grad else p.requires_grad_() for p in y]
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(y), y, create_graph=graph)
        y = [p - r * s for p, r, s in zip(y, rate, slopes, strict=True)]
    return y


def regression() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    X, X_val = torch.randn(40, 20), torch.randn(40, 20)
    return X, X[:, :5].sum(1) + torch.randn(40), X_val, X_val[:, :5].sum(1) + torch.randn(40)


def learned_rates() -> Loop:
    """That of docs/porting.md: a learned inner rate for each feature, 10 steps from zero."""
    X, t, X_val, t_val = regression()

    def run(x: list[Tensor], graph: bool) -> list[Tensor]:
        start = [torch.zeros(20), torch.zeros(())]
        rates = (x[0][:-1].exp(), x[0][-1].exp())
        return descended(lambda y: ((X @ y[0] + y[1] - t) ** 2).mean(), start, rates, 10, graph)

    return Loop(
        [torch.full((21,), -4.0, requires_grad=True)], run, lambda y: ((X_val @ y[0] + y[1] - t_val) ** 2).mean()
    )


def weight_decays() -> Loop:
    """The unrolled one of examples/porting.py: a weight decay for each feature, 30 steps from zero."""
    X, t, X_val, t_val = regression()

    def run(x: list[Tensor], graph: bool) -> list[Tensor]:
        def loss(y: list[Tensor]) -> Tensor:
            return ((X @ y[0] + y[1] - t) ** 2).mean() + (5.0 * x[0].sigmoid() * y[0] ** 2).sum()

        return descended(loss, [torch.zeros(20), torch.zeros(())], (0.05, 0.05), 30, graph)

    return Loop(
        [torch.full((20,), -3.0, requires_grad=True)], run, lambda y: ((X_val @ y[0] + y[1] - t_val) ** 2).mean()
    )


def maml() -> Loop:
    """Starting points of a network for eight regression tasks, 5 inner steps each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    names = [name for name, _ in model.named_parameters()]
    phase, height = 3.0 * torch.rand(8, 1, 1), 1.0 + 2.0 * torch.rand(8, 1, 1)
    inputs, inputs_val = 8.0 * torch.rand(8, 10, 1) - 4.0, 8.0 * torch.rand(8, 10, 1) - 4.0
    targets, targets_val = (height * (u + phase).sin() for u in (inputs, inputs_val))

    def fit(y: list[Tensor], u: Tensor, t: Tensor) -> Tensor:
        return (functional_call(model, dict(zip(names, y, strict=True)), u) - t).square().mean()

    def run(x: list[Tensor], graph: bool) -> list[Tensor]:
        ends = []
        for u, t in zip(inputs, targets, strict=True):
            start = [p if graph or forward_ad.unpack_dual(p).tangent is not None else p.detach() for p in x]
            ends += descended(lambda y: fit(y, u, t), start, [0.02] * len(names), 5, graph)
        return ends

    def val(y: list[Tensor]) -> Tensor:
        parts = [y[i * len(names) : (i + 1) * len(names)] for i in range(8)]
        return torch.stack([fit(*task) for task in zip(parts, inputs_val, targets_val, strict=True)]).mean()

    return Loop([p.detach().clone().requires_grad_() for p in model.parameters()], run, val)


LOOPS: dict[str, Callable[[], Loop]] = {"learned rates": learned_rates, "decays": weight_decays, "MAML": maml}


def pushed(loop: Loop, along: list[Tensor]) -> list[Tensor]:
    """Return w: the move of y_T for one unit of the step."""
    with forward_ad.dual_level():
        x = [forward_ad.make_dual(p, -d) for p, d in zip(loop.x, along, strict=True)]
        ends = [forward_ad.unpack_dual(p) for p in loop.run(x, False)]
        return [torch.zeros_like(p) if w is None else w.detach() for p, w in ends]


class AlongTheLoop:
    """The Response role: y_T(x) + a w."""

    comparable, hessian, offsets = True, None, None

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, point: Any, path: Any, redirect: Any, state: RoleState) -> Any:
        self.path, self.lower = path, point.lower
        with torch.enable_grad():
            self.w = pushed(self.loop, list(path.along))
        self.slope = -float(sum((g * w).sum() for g, w in zip(point.f_y, self.w, strict=True)))
        self.slope_ratio = self.slope / path.promised
        return self

    def commit(self, point: Any, model: Any, state: RoleState) -> RoleState:
        return RoleState()

    def close(self) -> None: ...

    def answer(self, step: float) -> None:
        for p, w in zip(self.lower, self.w, strict=True):
            p.add_(w, alpha=step)

    def changes(self) -> list[Any]:
        return []

    def effects(self) -> list[Any]:
        """Return nothing to compare."""
        return []

    def correction(self) -> None:
        return None


def trained(make: Callable[[], Loop], tangent: bool, iterations: int, direction: str) -> tuple[float, float, float]:
    """Return the loss at the end, trials per step, and milliseconds of CPU per step."""
    loop, began = make(), time.process_time()
    outer: Any
    if tangent:
        outer = BiSLS(loop.x, direction=direction, response=AlongTheLoop(loop), carry=False)
    else:
        outer = BiSLS(loop.x, direction=direction, hypergradient="direct")
    trials = 0
    for _ in range(iterations):
        if tangent:
            y = loop.run(loop.x, True)
            h = torch.autograd.grad(loop.val(y), loop.x)
            y = [p.detach() for p in y]
            outer.step(loop.val, lower=(y, lambda y: sum(p.square().sum() for p in y)), hypergradient=h)
        else:
            outer.step(lambda: loop.val(loop.run(loop.x, torch.is_grad_enabled())))
        trials += outer.record.trials
    cost = 1e3 * (time.process_time() - began) / iterations
    return float(loop.val(loop.run(loop.x, False)).detach()), trials / iterations, cost


def timed(work: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - began))
    return statistics.median(found)


def main(argv: list[str] | None = None) -> dict[tuple[str, str], Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[tuple[str, str], Any] = {}
    print("| loop | gradient | run again | JVP | direction | loss, again (trials, ms) | loss, tangent (trials, ms) |")
    for name, make in LOOPS.items():
        loop = make()
        along = [torch.randn_like(p) for p in loop.x]
        costs = [
            timed(lambda: torch.autograd.grad(loop.val(loop.run(loop.x, True)), loop.x), arguments.repeats),
            timed(lambda: loop.val(loop.run(loop.x, False)), arguments.repeats),
            timed(lambda: pushed(loop, along), arguments.repeats),
        ]
        for direction in ("sgd", "adam"):
            runs = [trained(make, tangent, arguments.iterations, direction) for tangent in (False, True)]
            found[name, direction] = costs, runs
            shown = " | ".join(f"{cost:.2f}" for cost in costs)
            ends = " | ".join(f"{loss:.4g} ({trials:.1f}, {cost:.1f})" for loss, trials, cost in runs)
            print(f"| {name} | {shown} | {direction} | {ends} |", flush=True)
    return found


if __name__ == "__main__":
    main()
