"""The two training loops, and what is recorded of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from adaptive_bilevel.hypergradient import assign, implicit
from methods import Hooks, SingleStep
from tasks import LogisticRegression, Task
from tasks.base import Evaluation

DIVERGED = 10.0  # times the loss at the start


@dataclass
class Run:
    """What is kept of a run: `step_sizes` has an entry per (upper) iteration, `evaluations` one per evaluation."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    trials: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    loss_calls: dict[str, int] = field(default_factory=lambda: {"upper": 0, "lower": 0})
    oracle_calls: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes down the step that `optimizer` just made."""
        record = getattr(optimizer, "record", None)
        if record is None:
            self.step_sizes.append(float(optimizer.param_groups[0]["lr"]))
            return
        self.step_sizes.append(float(record.step_size))
        self.trials += int(record.trials)
        name = getattr(record.outcome, "name", str(record.outcome))
        self.outcomes[name] = self.outcomes.get(name, 0) + 1

    def count(self, level: str, closure: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The closure, counting its calls (forward passes)."""

        def counted() -> torch.Tensor:
            self.loss_calls[level] += 1
            return closure()

        return counted

    def evaluate(self, iteration: int, evaluation: Evaluation) -> None:
        self.evaluations.append({"iteration": iteration, "seconds": round(self.seconds, 3), **evaluation})

    def diverged(self) -> bool:
        """Non-finite, or above ten times the start, at any evaluation."""
        losses = [evaluation["loss"] for evaluation in self.evaluations]
        return not all(math.isfinite(loss) and loss <= DIVERGED * abs(losses[0]) for loss in losses)

    def summary(self) -> dict[str, Any]:
        """The figures of a results table: medians of the last three evaluations, and the last one itself."""
        last = self.evaluations[-3:]
        keys = [key for key in last[-1] if key not in ("iteration", "seconds")]
        return {
            **{key: median(evaluation[key] for evaluation in last) for key in keys},
            **{f"last_{key}": last[-1][key] for key in keys},
            "diverged": self.diverged(),
            "trials_per_iteration": self.trials / max(len(self.step_sizes), 1),
            "seconds": round(self.seconds, 2),
        }


def train_bilevel(task: Task, hooks: Hooks, seed: int) -> Iterator[Run]:
    """Runs the upper iterations, each with a fresh minibatch of each level, yielding at each evaluation."""
    settings, run = task.settings, Run()
    solver = settings.make_solver()
    generator = torch.Generator().manual_seed(seed)
    run.evaluate(0, task.evaluate())
    for iteration in range(1, settings.iterations + 1):
        started = time.perf_counter()
        train = task.sample_lower(generator)
        for step in range(settings.lower_steps):
            if step and settings.fresh_lower_batches:
                train = task.sample_lower(generator)
            lower_closure = run.count("lower", partial(task.lower_loss, train))
            hooks.lower_step(lower_closure)
        validation = task.sample_upper(generator)
        upper_closure = run.count("upper", partial(task.upper_loss, validation))
        assign(task.upper, implicit(upper_closure, lower_closure, task.upper, task.lower, solver=solver))
        hooks.upper_step(upper_closure, lower_closure)
        run.seconds += time.perf_counter() - started
        run.note(hooks.outer)
        if iteration % settings.evaluate_every == 0 or iteration == settings.iterations:
            run.evaluate(iteration, task.evaluate())
            run.oracle_calls = oracle_calls(hooks.outer)
            yield run
            if not math.isfinite(run.evaluations[-1]["loss"]):
                return


def train_single(
    task: LogisticRegression, optimizer: torch.optim.Optimizer, step: SingleStep, seed: int
) -> Iterator[Run]:
    """Runs the task's iterations, yielding at each evaluation; two-sample rules get a second, independent batch."""
    settings, run = task.settings, Run()
    generator = torch.Generator().manual_seed(seed)
    second_generator = torch.Generator().manual_seed(seed + 10_000)
    run.evaluate(0, task.evaluate())
    for iteration in range(1, settings.iterations + 1):
        started = time.perf_counter()
        closure = run.count("lower", partial(task.loss, task.sample(generator)))
        second = run.count("lower", partial(task.loss, task.sample(second_generator)))
        step(closure, second)
        run.seconds += time.perf_counter() - started
        run.note(optimizer)
        if iteration % settings.evaluate_every == 0 or iteration == settings.iterations:
            run.evaluate(iteration, task.evaluate())
            yield run
            if not math.isfinite(run.evaluations[-1]["loss"]):
                return


def oracle_calls(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, int]]:
    """The optimizer's own count of its oracle calls, where it keeps one."""
    counts = getattr(optimizer, "evaluations", None)
    if counts is None:
        return {}
    kinds = ("values", "gradients", "hvps", "jvps")
    return {level: {kind: int(getattr(getattr(counts, level), kind)) for kind in kinds} for level in ("upper", "lower")}
