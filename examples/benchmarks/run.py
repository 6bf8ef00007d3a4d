"""Runs methods on a task over seeds and writes one small JSON file per run; runs whose file exists are not repeated.

Examples, from the project's folder:

    R="python examples/benchmarks/run.py --data DIR --output results"
    $R hyper-representation --method adam:lr=1e-3 --method bisls-adam --seeds 0 1 2
    $R w8a --method sgd:lr=100 --method spsb:lr=1000,two_sample=True
    $R hyper-cleaning --method bisls-sgd:lr=1e3,carry=False --set lower_steps=1 solver_steps=3
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import data
from loop import Run, train_bilevel, train_single
from methods import BILEVEL, SINGLE_LEVEL
from tasks import TASKS, LogisticRegression


@dataclass(frozen=True)
class Method:
    """A method as the command line names it: ``bisls-adam:lr=100,carry=False``."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Method:
        name, _, rest = text.partition(":")
        return cls(name, assignments(rest.split(",")) if rest else {})

    def __str__(self) -> str:
        return self.name + "".join(f" {key}={_short(value)}" for key, value in self.options.items())


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """``["lr=1e-3", "carry=auto"]`` as a dictionary; what is no Python literal stays a string."""
    content = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"{pair!r}: write key=value.")
        try:
            content[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            content[key] = value
    return content


def start(
    task_name: str, method: Method, seed: int, folder: str | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], Iterator[Run]]:
    """A fresh task and its training, not yet begun."""
    task = TASKS[task_name](seed, folder, **overrides)
    settings = asdict(task.settings)
    if isinstance(task, LogisticRegression):
        optimizer, step = lookup(SINGLE_LEVEL, method.name)(task.params, **method.options)
        return settings, train_single(task, optimizer, step, seed)
    make = lookup(BILEVEL, method.name)
    hooks = make(task.upper, task.lower, task.lower_rule, task.settings.make_solver(), **method.options)
    return settings, train_bilevel(task, hooks, seed)


def lookup(table: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    if name not in table:
        raise SystemExit(f"method {name!r}: this task has {', '.join(table)}.")
    return table[name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # so that `command` knows --data when it sees it
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--method", action="append", required=True, help="NAME or NAME:key=value,key=value; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the task's settings")
    parser.add_argument("--data", help="folder of the data sets (else the environment's, else scikit-learn's digits)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    overrides = assignments(options.set)
    shipped = "" if data.folder(options.data) else "-without-data"  # the digits in place of MNIST: another task
    for method in map(Method.parse, options.method):
        summaries = []
        for seed in options.seeds:
            path = options.output / file_name(options.task + shipped, method, overrides, seed)
            if not path.exists():
                settings, runs = start(options.task, method, seed, options.data, overrides)
                run = follow(runs, f"{options.task}  {method}  seed {seed}")
                write(path, {
                    "task": options.task, "method": method.name, "options": method.options, "seed": seed,
                    "overrides": overrides, "settings": settings, "command": command(arguments),
                    "torch": torch.__version__, "python": platform.python_version(),
                    "summary": run.summary(), **asdict(run), "step_sizes": thinned(run.step_sizes),
                })  # fmt: skip
            summaries.append(json.loads(path.read_text())["summary"])
        print(f"{options.task}  {method}  " + "  ".join(over_seeds(summaries)), flush=True)


def follow(runs: Iterator[Run], title: str) -> Run:
    """Runs to the end, showing where it is; on a terminal in one line."""
    last = None
    for last in runs:
        if sys.stderr.isatty():
            now = last.evaluations[-1]
            message = f"{title}  iteration {now['iteration']}  loss {now['loss']:.4g}"
            print(f"\r{message:<100}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    assert last is not None
    return last


def over_seeds(summaries: list[dict[str, Any]]) -> Iterator[str]:
    """The median over seeds and the range, as in "loss .0587 [.0571, .0602]"."""
    for key in (key for key in summaries[0] if key != "diverged"):
        values = [summary[key] for summary in summaries]
        spread = f" [{_short(min(values))}, {_short(max(values))}]" if len(values) > 1 else ""
        yield f"{key} {_short(median(values))}{spread}"
    yield f"diverged {sum(summary['diverged'] for summary in summaries)}/{len(summaries)}"


def file_name(task: str, method: Method, overrides: dict[str, Any], seed: int) -> str:
    parts = [method.name, *(f"{key}={_short(value)}" for key, value in (method.options | overrides).items())]
    return f"{task}__{'_'.join(parts)}__seed{seed}.json".replace(os.sep, "-")


def command(arguments: Sequence[str] | None) -> str:
    """The command of this run, with the data folder left out: it is the reader's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = ["--data=DIR" if word.startswith("--data=") else word for word in words]
    if "--data" in words:
        words[words.index("--data") + 1] = "DIR"
    return shlex.join(["python", "examples/benchmarks/run.py", *words])


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, so that an interrupted run is not taken for a finished one; one line per entry."""
    lines = (f" {json.dumps(key)}: {json.dumps(value, default=str)}" for key, value in content.items())
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    unfinished.replace(path)


def thinned(values: list[float], at_most: int = 500) -> list[float]:
    """Every n-th value, in five digits."""
    return [float(f"{value:.5g}") for value in values[:: max(1, len(values) // at_most)]]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
