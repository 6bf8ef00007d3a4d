"""Runs: a task, a method and a seed, each with one small JSON file; what has its file is not run again.

Runs that are started together are interleaved in one process: each goes to its next evaluation in turn, so that what
else the machine does meets all of them alike.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import random
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from loop import Run, followed, train_bilevel, train_row, train_single
from methods import BILEVEL as BILEVEL_METHODS
from methods import ROWS, Unavailable, lower_rule
from methods import SINGLE_LEVEL as SINGLE_LEVEL_METHODS
from tasks import BILEVEL, SINGLE_LEVEL

Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method as the command line names it: ``bisls-adam:lr=100,carry=False``."""

    name: str
    options: Options = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        name, _, rest = text.partition(":")
        return cls(name, assignments(rest.split(",")) if rest else {})

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={_short(value)}" for key, value in self.options.items())])


@dataclass(frozen=True)
class Job:
    """One run. `settings` go to the task: its own arguments and overrides of its `Settings`."""

    task: str
    settings: Mapping[str, Any]
    method: Method
    seed: int

    def path(self, output: Path, folder: str | None) -> Path:
        """The run's file: readable, and with a hash of everything that decides the run."""
        key = json.dumps([self.task, self.settings, self.method.name, self.method.options], sort_keys=True, default=str)
        stem = "_".join([self.task, str(self.method).replace(" ", "_").replace(os.sep, "-"), f"seed{self.seed}"])
        shipped = "" if data.folder(folder) else "-without-data"  # another problem
        return output / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}{shipped}.json"

    def start(self, folder: str | None) -> tuple[Options, Any, Iterator[Run]]:
        """The settings, the task and its training, not yet begun."""
        options, state = dict(self.method.options), Run()
        if self.task in SINGLE_LEVEL:
            single = SINGLE_LEVEL[self.task](self.seed, folder, **self.settings)
            optimizer, step = _lookup(SINGLE_LEVEL_METHODS, self.method.name)(single.params, **options)
            return (
                asdict(single.settings),
                single,
                followed(train_single(single, optimizer, step, self.seed, state), state),
            )
        task = _lookup(BILEVEL, self.task)(self.seed, folder, **self.settings)
        if self.method.name in ROWS:
            return (
                asdict(task.settings),
                task,
                followed(train_row(task, self.method.name, self.seed, state, **options), state),
            )
        if "solver" in options:
            task.settings = replace(task.settings, solver=options.pop("solver"))
        rule = lower_rule(options.pop("lower", None), task.lower_rule)
        make = _lookup(BILEVEL_METHODS, self.method.name)
        hooks = make(task.upper, task.lower, rule, task.settings.make_solver(), **options)
        return asdict(task.settings), task, followed(train_bilevel(task, hooks, self.seed, state), state)


def assignments(pairs: Sequence[str]) -> Options:
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


def run(
    jobs: Iterable[Job], output: Path, folder: str | None, at_once: int = 40
) -> tuple[list[Options], dict[str, str]]:
    """Runs what is missing, interleaved, and returns the content of all files, and the methods that could not run.

    `at_once` bounds the memory. Runs start in a random, fixed order.
    """
    output.mkdir(parents=True, exist_ok=True)
    provenance()
    jobs = list(jobs)
    waiting = {job.path(output, folder): job for job in jobs if not job.path(output, folder).exists()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptiveBilevelWarning)  # failed searches and the like: the tables count them
        missing = _run_all(waiting, folder, at_once)
    paths = [job.path(output, folder) for job in jobs]
    return [json.loads(path.read_text()) for path in paths if path.exists()], missing


def _run_all(jobs: dict[Path, Job], folder: str | None, at_once: int) -> dict[str, str]:
    waiting, missing = list(jobs.items()), {}
    random.Random(0).shuffle(waiting)
    going: dict[Path, tuple[Job, Options, Any, Iterator[Run]]] = {}
    with tqdm(total=len(waiting), unit="run", disable=None if waiting else True) as bar:
        while waiting or going:
            while waiting and len(going) < at_once:
                path, job = waiting.pop()
                try:
                    going[path] = (job, *job.start(folder))
                except Unavailable as reason:
                    if job.method.name not in missing:
                        tqdm.write(f"skipped: {reason}")
                    missing[job.method.name] = str(reason)
            for path, (job, settings, task, training) in list(going.items()):
                state = next(training)
                if state.evaluations[-1]["iteration"] == settings["iterations"] or state.hopeless():
                    _write(path, _content(job, settings, task, state))
                    del going[path]
                    bar.update()
    return missing


def _content(job: Job, settings: Options, task: Any, run: Run) -> Options:
    picture = getattr(task, "picture", None)  # of the upper variables, where that is something to look at
    return {
        "task": job.task,
        "method": job.method.name,
        "options": job.method.options,
        "seed": job.seed,
        "overrides": job.settings,
        "settings": settings,
        **provenance(),
        "summary": run.summary(),
        **asdict(run),
        "step_sizes": thinned(run.step_sizes),
        "lower_step_sizes": thinned(run.lower_step_sizes),
        **({"picture": picture()} if picture else {}),
    }


@cache
def provenance() -> dict[str, str | None]:
    """What the figures depend on besides their settings."""
    here = Path(__file__).parent
    git = partial(subprocess.run, cwd=here, capture_output=True, text=True)
    found = git(["git", "log", "-1", "--format=%h", "--", "../../adaptive_bilevel"])
    commit = found.stdout.strip() if found.returncode == 0 else None
    return {"core_commit": commit, "torch": torch.__version__, "python": platform.python_version()}


def _lookup(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise SystemExit(f"{name!r}: choose from {', '.join(table)}.")
    return table[name]


def _write(path: Path, content: Options) -> None:
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
