"""BiSLS on random convex quadratics: first trials over seven decades, exact and inexact solves, the paper's rule too.

    python examples/benchmarks/quadratics.py --output examples/benchmarks/results/quadratics.json

One row is a cell (rule, mu, T, direction, solver): the runs are first trials x seeds, K = 60. "diverged": F not finite
or above 10 F(x_0) at any iteration. The gap is (F(x_K) - F*) / (F(x_0) - F*), median over the runs. "reference" is the
table of the prototype (lower carried always, c = .1), which the bar of 1.5x refers to. Finished rows are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from adaptive_bilevel import BiSLS, OneStepBiSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.policies import Outcome
from tasks import random_quadratic

FIRST_TRIALS = (0.01, 1.0, 10.0, 1e3, 1e5, None)
TOLERANCES = (0.0, 0.1, 0.01)
REFERENCE = {  # (mu, direction, T) -> medians for exact, CG .1, CG .01
    (0.2, "sgd", 1): (1.2e-4, 2.5e-4, 1.2e-4),
    (0.2, "sgd", 10): (9e-5, 2.5e-4, 9e-5),
    (0.2, "adam", 1): (1.3e-3, 1.5e-3, 1.3e-3),
    (0.2, "adam", 10): (9e-4, 1e-3, 9e-4),
    (0.01, "sgd", 1): (1.6e-2, 1.2e-2, 1.6e-2),
    (0.01, "sgd", 10): (1.1e-3, 1.0e-3, 1.1e-3),
    (0.01, "adam", 1): (1.1e-2, 1.3e-2, 1.0e-2),
    (0.01, "adam", 10): (1.3e-3, 1.6e-3, 1.3e-3),
}
PAPER: dict[str, Any] = {"grow": 2.0, "c": 0.1}
Cell = tuple[str, float, int, str, float]


def run(
    seed: int, lr: float | None, rule: str, mu: float, steps: int, direction: str, tolerance: float
) -> dict[str, Any]:
    """One run: 60 upper iterations from x_0."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", AdaptiveBilevelWarning)
    task = random_quadratic.create(seed, mu=mu, lower_steps=steps)
    solver = CG(max_iterations=50, tolerance=tolerance)
    inner = task.lower_rule(task.lower)
    outer: BiSLS | OneStepBiSLS
    if rule == "paper":
        outer = OneStepBiSLS(task.upper, lr, lower=inner, direction=direction, **PAPER)
    else:
        outer = BiSLS(task.upper, lr, lower=inner, direction=direction, solver=solver)
    start = task.F(task.upper[0].detach())
    outcomes, trials, diverged = [], 0, False
    for _ in range(task.settings.iterations):
        for _ in range(steps):
            inner.step(partial(task.lower_loss, None))
        upper, lower = partial(task.upper_loss, None), partial(task.lower_loss, None)
        assign(task.upper, implicit(upper, lower, task.upper, task.lower, solver=solver))
        outer.step(upper)
        assert outer.record is not None
        outcomes.append(outer.record.outcome)
        trials += outer.record.trials
        value = task.F(task.upper[0].detach())
        diverged = diverged or not (math.isfinite(value) and value <= 10 * start)
    return {
        "diverged": diverged,
        "failed": outcomes.count(Outcome.search_failed),
        "no_descent": outcomes.count(Outcome.no_descent),
        "trials": trials / len(outcomes),
        "gap": task.evaluate()["gap"],
    }


def row(cell: Cell, seeds: int, first_trials: list[float | None], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """The statistics of a cell."""
    rule, mu, steps, direction, tolerance = cell
    jobs = [
        pool.submit(run, s, lr, *cell) for lr in first_trials for s in range(seeds) if (rule, lr) != ("paper", None)
    ]
    runs = [job.result() for job in jobs]
    gaps = [r["gap"] if math.isfinite(r["gap"]) else math.inf for r in runs]
    reference = REFERENCE[mu, direction, steps][TOLERANCES.index(tolerance)]
    return {
        "rule": rule,
        "mu": mu,
        "T": steps,
        "direction": direction,
        "tolerance": tolerance,
        "runs": len(runs),
        "first_trials": first_trials,
        "diverged": sum(r["diverged"] for r in runs),
        "failed_searches": sum(r["failed"] for r in runs),
        "failed_percent": 100 * mean(r["failed"] for r in runs) / 60,
        "no_descent_percent": 100 * mean(r["no_descent"] for r in runs) / 60,
        "trials_per_iteration": mean(r["trials"] for r in runs),
        "median_gap": median(gaps),
        "reference_gap": reference,
        "ratio_to_reference": median(gaps) / reference,
    }


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rules", nargs="+", default=["default", "paper"], choices=["default", "paper"])
    parser.add_argument("--tolerances", nargs="+", type=float, default=list(TOLERANCES), help="of CG; 0 = exact")
    parser.add_argument("--first-trials", nargs="+", default=[str(lr) for lr in FIRST_TRIALS], help="None: none given")
    arguments = parser.parse_args()
    first_trials = [None if lr == "None" else float(lr) for lr in arguments.first_trials]
    content: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "rows": []}
    if arguments.output.exists():
        content["rows"] = json.loads(arguments.output.read_text())["rows"]
    done = {(r["rule"], r["mu"], r["T"], r["direction"], r["tolerance"]) for r in content["rows"]}
    cells: list[Cell] = [
        (rule, mu, steps, direction, tolerance)
        for rule, tolerance in itertools.product(arguments.rules, arguments.tolerances)
        for mu, steps, direction in itertools.product((0.2, 0.01), (1, 10), ("sgd", "adam"))
        if rule == "default" or tolerance == 0.0
    ]
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for cell in cells:
            if cell not in done:
                content["rows"].append(row(cell, arguments.seeds, first_trials, pool))
                arguments.output.write_text(json.dumps(content, indent=1) + "\n")
                r = content["rows"][-1]
                print(
                    f"{time.perf_counter() - started:5.0f}s {cell}: diverged {r['diverged']}/{r['runs']}, failed "
                    f"{r['failed_percent']:.1f} %, no descent {r['no_descent_percent']:.1f} %, trials "
                    f"{r['trials_per_iteration']:.2f}, gap {r['median_gap']:.1e} ({r['ratio_to_reference']:.2f}x)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
