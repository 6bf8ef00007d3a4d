"""Cost and peak memory of an upper iteration against parameters, lower steps, solver steps and batch.

    python examples/benchmarks/scaling.py [--quick] [--most N] [--output scaling.json]

The problem: softmax regression on random data, y its weights, x one log-penalty per weight; f is the validation loss.
Every figure comes from a process of its own. "plain" is a loop with constant steps at both levels (SGD below, SGD or
Adam above) and the same hypergradient by CG; "bisls" has `SLS` below and `BiSLS` above, with no number. Seconds are of
processor time (medians), cost is in gradients. "peak" is the most that all tensors beyond data and parameters held, in
copies of y (x is as large): gradients, graphs, solver vectors and optimizer state included. See `live`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, SPSMax
from adaptive_bilevel.evaluation.counts import Counts
from adaptive_bilevel.hypergradient import CG, assign, implicit_with_info
from live import live_bytes
from methods import plain_step

BASE = {"parameters": 100_000, "lower_steps": 5, "solver_steps": 10, "batch": 64}
SWEEPS: dict[str, tuple[int, ...]] = {
    "parameters": (1_000, 10_000, 100_000, 1_000_000),
    "lower_steps": (1, 5, 20),
    "solver_steps": (1, 3, 10, 30),
    "batch": (16, 64, 256, 1024),
}
METHODS = ("plain-sgd", "bisls-sgd", "plain-adam", "bisls-adam")
SINGLE: dict[str, Callable[[list[Tensor]], Any]] = {
    "torch SGD": lambda y: torch.optim.SGD(y, lr=1e-2),
    "torch Adam": lambda y: torch.optim.Adam(y, lr=1e-3),
    "SPSMax": SPSMax,
    "SPSB": SPSB,
    "SLS": SLS,
    "SLSB": SLSB,
    "SLS, Adam": lambda y: SLS(y, direction="adam"),
}
CLASSES = 10


class Problem:
    """Softmax regression with a penalty exp(x) y^2 per weight."""

    def __init__(self, parameters: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        features = parameters // CLASSES
        self.y = [torch.zeros(features, CLASSES, requires_grad=True)]
        # A wide spectrum: with a narrow one CG would end early for whoever is near the start, and costs not compare.
        self.x = [(8.0 * torch.rand(features, CLASSES, generator=generator) - 9.0).requires_grad_()]
        self.parts = [
            (torch.randn(batch, features, generator=generator) / features**0.5,
             torch.randint(CLASSES, (batch,), generator=generator))
            for _ in range(2)
        ]  # fmt: skip

    def _loss(self, part: int) -> Tensor:
        inputs, labels = self.parts[part]
        return torch.nn.functional.cross_entropy(inputs @ self.y[0], labels)

    def upper(self) -> Tensor:
        return self._loss(0)

    def lower(self) -> Tensor:
        return self._loss(1) + (self.x[0].exp() * self.y[0] ** 2).sum()


def bilevel(method: str, parameters: int, lower_steps: int, solver_steps: int, batch: int) -> tuple[Any, Any]:
    """An upper iteration, and what the last one cost in gradients."""
    problem, (kind, direction) = Problem(parameters, batch), method.split("-")
    solver, plain = CG(max_iterations=solver_steps, tolerance=0.0), kind == "plain"
    counts = Counts()
    inner: Any = torch.optim.SGD(problem.y, lr=0.1) if plain else SLS(problem.y)
    if plain:
        outer: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[direction](problem.x, lr=1e-2)
    else:
        outer = BiSLS(problem.x, lower=inner, direction=direction, solver=solver)

    lower_step = plain_step(inner, problem.y)

    def iterate() -> None:
        for _ in range(lower_steps):
            lower_step(problem.lower)
        h, info = implicit_with_info(problem.upper, problem.lower, problem.x, problem.y, solver=solver)
        assign(problem.x, h)
        counts.gradients += info.gradients + (lower_steps if plain else 0)
        counts.hvps += info.hvps
        counts.jvps += info.jvps
        del h, info  # a loop that calls implicit holds neither
        outer.step() if plain else outer.step(problem.upper)

    def cost() -> float:
        if plain:
            return counts.cost
        return (
            counts.cost
            + inner.evaluations.lower.cost
            + sum(level.cost for level in (outer.evaluations.upper, outer.evaluations.lower))
        )

    return iterate, cost


def single(method: str, parameters: int, batch: int) -> tuple[Any, Any]:
    problem = Problem(parameters, batch)
    step = plain_step(SINGLE[method](problem.y), problem.y)
    return lambda: step(problem.lower), lambda: 0.0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: seconds and cost of an iteration, and the peak of another run."""
    torch.set_num_threads(1)
    method, iterations = job.pop("method"), job.pop("iterations")
    small = {**job, "parameters": 1_000}
    make = single if method in SINGLE else bilevel
    make(method, **small)[0]()  # loads code and starts threads, whatever the size
    iterate, cost = make(method, **job)
    seconds, costs = [], [cost()]
    for _ in range(iterations):
        start = time.process_time()
        iterate()
        seconds.append(time.process_time() - start)
        costs.append(cost())
    iterate, _ = make(method, **job)
    peak = max(live_bytes(lambda: [iterate() for _ in range(iterations)]))
    return {
        "seconds": statistics.median(seconds[1:]), "cost": (costs[-1] - costs[1]) / (iterations - 1),
        "peak": peak / (4.0 * job["parameters"]),
    }  # fmt: skip


def child(**job: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sweeps(quick: bool, most: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, values in SWEEPS.items():
        while name == "parameters" and 10 * values[-1] <= most:
            values = (*values, 10 * values[-1])
        for value in values[: 2 if quick else None]:
            job = {**BASE, name: value}
            large = job["parameters"] >= 1_000_000
            iterations = 4 if quick else 6 if large else 30
            found = {method: child(method=method, iterations=iterations, **job) for method in METHODS}
            for kind in ("sgd", "adam"):
                ours, plain = found[f"bisls-{kind}"], found[f"plain-{kind}"]
                ratios = {f"{key}_ratio": ours[key] / plain[key] for key in ("seconds", "cost")}
                rows.append({"sweep": name, "value": value, "direction": kind, "ours": ours, "plain": plain, **ratios})
                peaks = f", peak {plain['peak']:.1f} and {ours['peak']:.1f} copies" if large else ""
                print(
                    f"{name} {value:,} {kind}: plain {plain['seconds']:.4f} s an iteration; ours over plain "
                    f"{ratios['seconds_ratio']:.2f} in seconds, {ratios['cost_ratio']:.2f} in gradients{peaks}",
                    flush=True,
                )
    return rows


def single_level(size: int) -> dict[str, float]:
    peaks = {}
    for method in SINGLE:
        peaks[method] = child(method=method, iterations=8, parameters=size, batch=64)["peak"]
        print(f"single level, {size:,} parameters, {method}: peak {peaks[method]:.2f} copies", flush=True)
    return peaks


def growth(size: int, iterations: int) -> dict[str, list[float]]:
    job = {**BASE, "parameters": size}
    peaks = {m: [child(method=m, iterations=n, **job)["peak"] for n in (5, iterations)] for m in METHODS[1::2]}
    print(f"peak after 5 and after {iterations} iterations, {size:,} parameters: {peaks}", flush=True)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest two of each sweep: does it run?")
    parser.add_argument("--most", type=int, help="also 10 times as many parameters as the largest, up to this number")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    size = 10_000 if arguments.quick else 5_000_000
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "sweeps": sweeps(arguments.quick, arguments.most or 0),
        "single_level_peak": single_level(size),
        "growth": growth(size // 10, 20 if arguments.quick else 100),
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
