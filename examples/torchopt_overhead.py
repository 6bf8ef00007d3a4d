"""What an upper step costs in TorchOpt beyond the evaluations that it makes, and the loop's peak memory.

    python examples/torchopt_overhead.py

The lower problem is LeNet-5 on random 28x28 images, batch 128, with weights for the classes; those are the upper
variable. Processor time of ``UpperStep.step()`` is compared with that inside its evaluations (losses, gradients and
products with second derivatives), with and without TorchOpt's hypergradient, which is the first of them. The peak of
all tensors together is compared with that of TorchOpt's loop with fixed steps and the same linear solver.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchopt
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptive_bilevel import SLS, SPSB, BiSPS
from adaptive_bilevel_torchopt import LowerStep, UpperStep

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from live import live_bytes
from overhead import Clock, lenet

BATCH, LOWER_STEPS, CG_STEPS = 128, 5, 3
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    # name: lower rule, upper options; None: TorchOpt's own loop
    "SGD / SGD": (None, {}),
    "BiSLS / SLS": (SLS, {}),
    "BiSLS, adam / SLS": (SLS, {"direction": "adam"}),
    "BiSPS / SPSB": (SPSB, {"rule": BiSPS}),
}


class Weighted(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg(maxiter=CG_STEPS)):
    def __init__(self, x: Tensor, batch: tuple[Tensor, Tensor], rule: Any) -> None:
        super().__init__()
        self.x, self.batch = x, batch
        self.net = lenet()
        self.lower = None if rule is None else LowerStep(self, rule)

    def objective(self) -> Tensor:
        images, classes = self.batch
        losses = cross_entropy(self.net(images), classes, reduction="none")
        decay = sum(p.square().sum() for p in self.parameters())
        return (self.x.sigmoid()[classes] * losses).mean() + 0.01 * decay

    def validation_loss(self) -> Tensor:
        return cross_entropy(self.net(self.batch[0]), self.batch[1])

    def solve(self) -> None:
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(LOWER_STEPS):
                step(lambda: self.objective())
            return
        params = tuple(self.parameters())
        for p in params:
            p.detach_().requires_grad_()
        optimizer = torchopt.SGD(params, lr=0.05)
        with torch.enable_grad():
            for _ in range(LOWER_STEPS):
                loss = self.objective()
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()


class Loop:
    """One of the cases; `upper` takes an upper step after ``inner.solve()``."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        rule, options = CASES[name]
        self.x = torch.zeros(10, requires_grad=True)
        batch = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
        self.inner = Weighted(self.x, batch, rule)
        self.automatic, lower = rule is not None, self.inner.lower
        self.meta: Any
        self.meta = UpperStep([self.x], lower=lower, **options) if lower else torchopt.SGD([self.x], lr=1.0)

    def upper(self) -> None:
        if self.automatic:
            self.meta.step(self.inner.validation_loss)
        else:
            loss = self.inner.validation_loss()
            self.meta.zero_grad()
            loss.backward()
            self.meta.step()


def peak(name: str, iterations: int) -> int:
    """Return the largest number of bytes that all tensors of a case had together."""

    def run() -> None:
        loop = Loop(name)
        for _ in range(iterations):
            loop.inner.solve()
            loop.upper()

    return max(live_bytes(run))


def measure(name: str, repeats: int, clock: Clock) -> dict[str, Any]:
    """Return what the upper steps of a case cost, in microseconds."""
    loop = Loop(name)
    inner: Any = loop.inner
    inner.objective = clock.timed(inner.objective)
    inner.validation_loss = clock.timed(inner.validation_loss)
    found = []
    for _ in range(repeats + 1):
        loop.inner.solve()
        clock.calls, start = [], time.thread_time()
        loop.upper()
        found.append((time.thread_time() - start, clock.inside, sum(clock.calls[:2])))
    found = found[1:]  # the first step looks at what TorchOpt takes for granted
    row: dict[str, Any] = {
        "step": round(1e6 * statistics.median(step for step, _, _ in found)),
        "evaluations": round(1e6 * statistics.median(inside for _, inside, _ in found)),
        "of which the hypergradient": round(1e6 * statistics.median(first for _, _, first in found)),
        "ratio": round(statistics.median(step / inside for step, inside, _ in found), 3),
    }
    if loop.automatic:
        rest = [(step - first) / (inside - first) for step, inside, first in found if inside > first]
        row["ratio without the hypergradient"] = round(statistics.median(rest), 3) if rest else None
        counts = loop.meta.evaluations
        row["calls"] = {"upper": vars(counts.upper), "lower": vars(counts.lower)}
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="upper steps")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peaks = {name: peak(name, 3) for name in CASES}
    clock = Clock()
    rows = {name: measure(name, options.repeats, clock) for name in CASES}
    print("upper steps in microseconds of processor time, medians; peak of all tensors")
    for name, row in rows.items():
        row["peak bytes"], row["peak ratio"] = peaks[name], round(peaks[name] / peaks["SGD / SGD"], 3)
        print(f"{name:20}" + "".join(f"  {key} {value}" for key, value in row.items() if key != "calls"))
    if options.output:
        command = shlex.join(["python", "examples/torchopt_overhead.py", *(arguments or sys.argv[1:])])
        content = {"command": command, "python": platform.python_version(), "torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
