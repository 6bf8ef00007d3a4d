"""What an upper and a lower step cost in Betty's engine beyond the evaluations that they make.

    python examples/betty_overhead.py

The lower problem is LeNet-5 on random 28x28 images, batch 128, with weights for the classes; those are the upper
variable. Processor time of ``optimizer.step()`` is compared with that inside its evaluations: losses, gradients, and
products with second derivatives. Lower steps are also compared with the whole step of Betty with torch.optim.SGD.
"""

from __future__ import annotations

import argparse
import json
import logging
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

import betty
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel_betty import SLS, SPSB, BiSLS, bind

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from overhead import Clock, lenet

BATCH, LOWER_STEPS = 128, 5


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(10))

    def forward(self, classes: Tensor) -> Tensor:
        return self.value.sigmoid()[classes]


class Upper(ImplicitProblem):
    def training_step(self, batch: Any) -> Tensor:
        return cross_entropy(self.inner(batch[0]), batch[1])


class Lower(ImplicitProblem):
    def training_step(self, batch: Any) -> Tensor:
        losses = cross_entropy(self.module(batch[0]), batch[1], reduction="none")
        decay = sum(p.square().sum() for p in self.module.parameters())
        return (self.outer(batch[1]) * losses).mean() + 0.01 * decay


def measure(name: str, upper: Any, lower: Any, repeats: int, clock: Clock) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = (torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,)))
    top, module = Weights(), lenet()
    outer = Upper("outer", Config(), module=top, optimizer=upper(top.parameters()), train_data_loader=[batch])
    inner = Lower(
        "inner",
        Config(type="darts", unroll_steps=LOWER_STEPS),
        module=module,
        optimizer=lower(module.parameters()),
        train_data_loader=[batch],
    )
    engine = Engine(
        config=EngineConfig(train_iters=LOWER_STEPS * repeats),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    problems: list[Any] = [outer, inner]
    for problem in problems:
        problem.training_step = clock.timed(problem.training_step)
    bind(engine)
    found: dict[str, list[tuple[float, float]]] = {"outer": [], "inner": []}
    descents: list[float] = []
    for problem in problems:
        step = problem.optimizer.step

        def watched(step: Any = step, name: str = problem.name) -> None:
            clock.calls, start = [], time.thread_time()
            step()
            found[name].append((time.thread_time() - start, clock.inside))

        problem.optimizer.step = watched
    descend = inner.one_step_descent

    def whole(batch: Any = None) -> Any:
        start = time.thread_time()
        report = descend(batch)
        descents.append(time.thread_time() - start)
        return report

    inner.one_step_descent = whole
    engine.run()
    row: dict[str, Any] = {"name": name, "whole lower step": 1e6 * statistics.median(descents)}
    for level, pairs in found.items():
        row[level] = {
            "step": round(1e6 * statistics.median(total for total, _ in pairs)),
            "evaluations": round(1e6 * statistics.median(evaluated for _, evaluated in pairs)),
        }
        if row[level]["evaluations"]:
            row[level]["ratio"] = round(statistics.median(t / e for t, e in pairs if e > 0), 3)
    if isinstance(outer.optimizer, BiSLS):
        counts = outer.optimizer.evaluations
        row["calls of the upper steps"] = {"upper": vars(counts.upper), "lower": vars(counts.lower)}
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="upper steps")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("betty").disabled = True
    warnings.simplefilter("ignore")
    clock = Clock()
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    rows = [
        measure("SGD / SGD", sgd, sgd, options.repeats, clock),
        measure("BiSLS / SGD", BiSLS, sgd, options.repeats, clock),
        measure("BiSLS, 3 CG steps / SLS", lambda p: BiSLS(p, solver=CG(3, 0.0)), SLS, options.repeats, clock),
        measure("SGD / SPSB", sgd, SPSB, options.repeats, clock),
    ]
    print("microseconds of processor time, medians: step, of which evaluations, ratio")
    for row in rows:
        cells = [f"{row[k]['step']:>8} {row[k]['evaluations']:>8} {row[k].get('ratio', ''):>6}" for k in found_levels]
        print(f"{row['name']:26} outer {cells[0]}   inner {cells[1]}   whole lower step {row['whole lower step']:.0f}")
    if options.output:
        command = shlex.join(["python", "examples/betty_overhead.py", *(arguments or sys.argv[1:])])
        content = {"command": command, "python": platform.python_version(), "torch": torch.__version__}
        options.output.write_text(json.dumps({**content, "betty": betty.__version__, "rows": rows}, indent=1) + "\n")
    return rows


found_levels = ("outer", "inner")

if __name__ == "__main__":
    main()
