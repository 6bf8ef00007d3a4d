"""The benchmark suite: tasks x methods x seeds in one interleaved run; a table and a figure for each benchmark.

    python examples/benchmarks/suite.py [--task NAME ...] [--quick] [--data DIR] [--output RUNS] [--results DIR]
    python examples/benchmarks/suite.py --task hyper-cleaning --method bisls-sgd:lr=1e3 --set lower_steps=1

Each run leaves a JSON file in RUNS and is not repeated; delete what should be. Baselines get a full grid of steps for
both levels: decades with the first seed, half decades around the winner, and the best two or three with all seeds. Ours
get no number at either level, and then first trials (or bounds) over six decades. "loss" of a run is the median of its
last three evaluations, "seconds" processor time without evaluations, "cost" that of all oracle calls in gradients.
A second form runs the methods that are named instead of the benchmark's own, and writes nothing but their runs. With
``--renew``, ours alone are run, and take the place of those in the results (see `renewal`).
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import data
import report
import tables
from benchmark import BENCHMARKS, QUICK, Benchmark
from grid import best
from renewal import renewed
from runs import Job, Method, assignments, run
from tasks.base import SOLVERS


def planned(benchmark: Benchmark, methods: Sequence[Method], seeds: Sequence[int]) -> list[Job]:
    """The runs of some methods."""
    return [Job(benchmark.task, benchmark.settings, method, seed) for method in methods for seed in seeds]


def execute(benchmark: Benchmark, output: Path, folder: str | None) -> report.Table:
    """Runs a benchmark in three rounds, of which the last two follow from the one before."""
    jobs, first, every = partial(planned, benchmark), benchmark.seeds[:1], benchmark.seeds
    named = [Method.parse(text) for text in (*benchmark.ours, *benchmark.others, *benchmark.first_trials)]
    tried = {grid.label: grid.coarse() for grid in benchmark.grids}
    known, missing = run([*jobs(named, every), *jobs([*chain(*tried.values())], first)], output, folder)
    table = report.Table(benchmark, known, missing)
    for grid in benchmark.grids:
        (winner,) = best(tried[grid.label], lambda method: table.score(method, first))
        tried[grid.label] += [method for method in grid.finer(winner) if method not in tried[grid.label]]
    table.add(run(jobs([*chain(*tried.values())], first), output, folder)[0])
    finalists = [
        method
        for methods in tried.values()
        for figure in table.figures
        for method in best(methods, partial(table.score, seeds=first, figure=figure), 2 if figure == "loss" else 1)
    ]
    table.add(run(jobs(finalists, every), output, folder)[0])
    table.tried = tried
    return table


def renew(benchmark: Benchmark, name: str, output: Path, results: Path, folder: str | None) -> None:
    """Runs our searches with no number, and writes them into the results of a task."""
    methods = [Method.parse(text) for text in benchmark.ours if text.startswith("bisls")]
    table = report.Table(benchmark, *run(planned(benchmark, methods, benchmark.seeds), output, folder))
    rows, path = table.renewable(), results / f"{name}.json"
    commits = {"core_commit": table.every("core_commit")}
    report.write(path, renewed(json.loads(path.read_text()), rows, commits))
    print(f"\n{name}: {benchmark.title}\n{tables.text(rows)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--renew", action="store_true", help="run ours alone, and put them into the results")
    parser.add_argument("--quick", action="store_true", help="a few iterations and steps of one task of each kind")
    parser.add_argument("--data", help="folder of the data sets (else the environment's, else a stand-in)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-runs"), help="folder for the runs")
    parser.add_argument("--results", type=Path, help="folder for tables and figures (else that of the runs)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the benchmark's own")
    parser.add_argument("--method", action="append", help="NAME or NAME:key=value,key=value; repeatable")
    parser.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help="of the task and its settings")
    parser.add_argument("--solver", choices=SOLVERS, help="the inverse of the lower Hessian, as --set solver=NAME")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.set = [*options.set, *([f"solver={options.solver}"] if options.solver else [])]
    torch.set_num_threads(options.threads)
    where = data.folder(options.data)
    folder = None if where is None else str(where)
    for name in options.task or (QUICK if options.quick else BENCHMARKS):
        benchmark = BENCHMARKS[name]
        if options.quick:
            benchmark = benchmark.quick()
        if options.seeds:
            benchmark = replace(benchmark, seeds=tuple(options.seeds))
        benchmark = replace(benchmark, settings={**benchmark.settings, **assignments(options.set)})
        output = options.output / (f"{name}-quick" if options.quick else name)
        if options.method:
            methods = [Method.parse(text) for text in options.method]
            table = report.Table(benchmark, *run(planned(benchmark, methods, benchmark.seeds), output, folder))
            print(tables.text(table.rows(methods)), flush=True)
            continue
        results = options.results or options.output
        if options.renew:
            renew(benchmark, name, output, results, folder)
            continue
        table = execute(benchmark, output, folder)
        results.mkdir(parents=True, exist_ok=True)
        words = ["--task", name, *["--quick"] * options.quick, "--data", "DIR", "--output", "RUNS"]
        words += ["--seeds", *map(str, options.seeds)] if options.seeds else []
        words += ["--set", *options.set] if options.set else []
        command = shlex.join(["python", "examples/benchmarks/suite.py", *words])
        report.publish(table, name, results, {"command": command, "data": "real" if folder else "stand-in"})


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process; else saturated runs take many times as long
    main()
