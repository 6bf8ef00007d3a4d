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
from torch import Tensor

from adaptive_bilevel.errors import NonFiniteError
from adaptive_bilevel.evaluation.counts import Counts
from adaptive_bilevel.hypergradient import Oracle, Point, Sample, Unroll, Visit, assign, implicit_with_info
from adaptive_bilevel.methods import BilevelProblem
from adaptive_bilevel.methods import run as methods_run
from methods import Hooks, SingleStep
from tasks import SingleLevelTask, Task
from tasks.base import Evaluation

DIVERGED = 10.0  # times the loss at the start
HOPELESS = 1e4  # times the loss at the start: not followed any further
MOVED = ("accepted", "at_bound", "at_floor", "kept")


@dataclass
class Run:
    """What is kept of a run: `step_sizes` has an entry per (upper) iteration, `evaluations` one per evaluation.

    `cost` is that of all oracle calls in gradients, by level: "lower" steps, "hypergradient", "upper" steps.
    `products` is that of Hessian-vector products among them; `first` is how the first upper step came out.
    """

    evaluations: list[dict[str, float]] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    lower_step_sizes: list[float] = field(default_factory=list)
    trials: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    first: str = ""
    products: int = 0
    cost: dict[str, float] = field(default_factory=lambda: {"lower": 0.0, "hypergradient": 0.0, "upper": 0.0})
    seconds: float = 0.0

    def note(self, optimizer: Any) -> None:
        """Takes down the step that `optimizer` just made."""
        self.step_sizes.append(step_size(optimizer))
        record = getattr(optimizer, "record", None)
        if record is not None:
            self.trials += int(record.trials)
            name = getattr(record.outcome, "name", str(record.outcome))
            self.outcomes[name] = self.outcomes.get(name, 0) + 1
            self.first = self.first or name

    def evaluate(self, iteration: int, evaluation: Evaluation) -> None:
        self.evaluations.append({"iteration": iteration, "seconds": round(self.seconds, 4), **evaluation})

    def hopeless(self) -> bool:
        """Whether to stop: not finite, or far above the start."""
        loss, start = self.evaluations[-1]["loss"], self.evaluations[0]["loss"]
        return not (math.isfinite(loss) and loss <= HOPELESS * abs(start))

    def diverged(self) -> bool:
        """Non-finite, or above ten times the start, at any evaluation."""
        losses = [evaluation["loss"] for evaluation in self.evaluations]
        return not all(math.isfinite(loss) and loss <= DIVERGED * abs(losses[0]) for loss in losses)

    def summary(self) -> dict[str, Any]:
        """The figures of a results table: medians of the last three evaluations, and the last one itself."""
        last, iterations = self.evaluations[-3:], max(len(self.step_sizes), 1)
        keys = [key for key in last[-1] if key not in ("iteration", "seconds")]
        steps = sum(self.outcomes.values())
        return {
            **{key: median(evaluation[key] for evaluation in last) for key in keys if key in last[0]},
            **{f"last_{key}": last[-1][key] for key in keys},
            "diverged": self.diverged(),
            "trials_per_iteration": self.trials / iterations,
            "failed": self.outcomes.get("search_failed", 0) / steps if steps else 0.0,
            "moved": sum(self.outcomes.get(name, 0) for name in MOVED) / steps if steps else 1.0,
            "first": self.first,
            "products_per_iteration": self.products / iterations,
            "cost_per_iteration": sum(self.cost.values()) / iterations,
            "seconds": round(self.seconds, 3),
        }


def step_size(optimizer: Any) -> float:
    """The step that was just taken: the record's, or the learning rate."""
    record = getattr(optimizer, "record", None)
    return float(optimizer.param_groups[0]["lr"] if record is None else record.step_size)


def cost(optimizer: Any, gradients: int = 0, values: int = 0) -> float:
    """The optimizer's own count of its oracle calls in gradients, or else the counts given here."""
    evaluations = getattr(optimizer, "evaluations", None)
    if evaluations is None:
        return Counts(values=values, gradients=gradients).cost
    total: float = evaluations.upper.cost + evaluations.lower.cost
    return total


def products(optimizer: Any) -> int:
    """The Hessian-vector products that the optimizer itself took."""
    evaluations = getattr(optimizer, "evaluations", None)
    return 0 if evaluations is None else int(evaluations.upper.hvps + evaluations.lower.hvps)


def followed(training: Iterator[Run], run: Run) -> Iterator[Run]:
    """The training; where an optimizer gives up on a loss that is not finite, that is its last evaluation."""
    try:
        yield from training
    except NonFiniteError:
        run.evaluate(len(run.step_sizes), {"loss": math.nan})
        yield run


def train_bilevel(task: Task, hooks: Hooks, seed: int, run: Run) -> Iterator[Run]:
    """Runs the upper iterations, each with a fresh minibatch of each level, yielding at each evaluation."""
    settings = task.settings
    solver = settings.make_solver()
    generator = torch.Generator().manual_seed(seed)
    second_generator = torch.Generator().manual_seed(seed + 10_000)
    spent = Counts()
    unrolling = Unrolling(task, spent) if settings.solver == "unroll" else None

    def differentiate(upper_closure: Any, lower_closure: Any) -> Any:
        if unrolling is not None:
            return unrolling.differentiate(upper_closure.args, lower_closure.args, step_size(hooks.inner))
        chosen: dict[str, Any] = {} if solver is None else {"solver": solver}
        h, info = implicit_with_info(upper_closure, lower_closure, task.upper, task.lower, **chosen)
        spent.gradients, spent.hvps, spent.jvps = (
            spent.gradients + info.gradients, spent.hvps + info.hvps, spent.jvps + info.jvps,
        )  # fmt: skip
        return info.upper_loss, h

    def second(lower_closure: Callable[[], Tensor]) -> Any:
        return differentiate(partial(task.upper_loss, task.sample_upper(second_generator)), lower_closure)

    run.evaluate(0, task.evaluate())
    for iteration in range(1, settings.iterations + 1):
        started = time.process_time()
        train = task.sample_lower(generator)
        for step in range(settings.lower_steps):
            if step and settings.fresh_lower_batches:
                train = task.sample_lower(generator)
            lower_closure = partial(task.lower_loss, train)
            if unrolling is not None:
                unrolling.remember()
            hooks.lower_step(lower_closure)
        upper_closure = partial(task.upper_loss, task.sample_upper(generator))
        assign(task.upper, differentiate(upper_closure, lower_closure)[1])
        hooks.upper_step(upper_closure, lower_closure, partial(second, lower_closure))
        run.seconds += time.process_time() - started
        run.note(hooks.outer)
        run.lower_step_sizes.append(step_size(hooks.inner))
        if iteration % settings.evaluate_every == 0 or iteration == settings.iterations:
            with hooks.evaluating():
                last = task.resolve() if iteration == settings.iterations else {}
                run.evaluate(iteration, {**task.evaluate(), **last})
            run.cost = {
                "lower": cost(hooks.inner, gradients=iteration * settings.lower_steps),
                "hypergradient": spent.cost,
                "upper": cost(hooks.outer, values=iteration * hooks.values),
            }
            run.products = spent.hvps + products(hooks.outer)
            yield run
            if run.hopeless():
                return


def at(task: Task, loss: Callable[[Any], Tensor]) -> Callable[[Any, Any, Any], Tensor]:
    """The loss as a function of x and y, for tasks whose losses read `upper` and `lower` from their lists."""

    def evaluated(x: Any, y: Any, batch: Any) -> Tensor:
        task.upper[:], task.lower[:] = x, y
        return loss(batch)

    return evaluated


class Unrolling:
    """The hypergradient through the last lower step alone, y - b grad_y g(x, y) with the b that was taken."""

    def __init__(self, task: Task, spent: Counts) -> None:
        self.task, self.spent = task, spent
        self.before: tuple[Tensor, ...] = ()
        self.estimator = Unroll(last=1)

    def remember(self) -> None:
        """Keeps y as it is before a lower step."""
        self.before = tuple(tensor.detach().clone() for tensor in self.task.lower)

    def differentiate(self, upper_batch: tuple[Any], lower_batch: tuple[Any], step: float) -> Any:
        """Loss and hypergradient; the task's tensors are in their lists again afterwards."""
        task = self.task
        upper, lower = list(task.upper), list(task.lower)
        oracle = Oracle(at(task, task.upper_loss), at(task, task.lower_loss))
        sample = Sample(*upper_batch, *lower_batch)
        x, y = (tuple(tensor.detach() for tensor in level) for level in (upper, lower))
        try:
            estimate = self.estimator(oracle, Point(x, y, path=(Visit(self.before, step, sample),)), sample)
        finally:
            task.upper[:], task.lower[:] = upper, lower
        for found in (oracle.evaluations.upper, oracle.evaluations.lower):
            self.spent.gradients += found.gradients
            self.spent.hvps += found.hvps
            self.spent.jvps += found.jvps
        return estimate.loss, estimate.hypergradient


def train_row(task: Task, name: str, seed: int, run: Run, **options: Any) -> Iterator[Run]:
    """Runs an algorithm of `adaptive_bilevel.methods` for the oracle cost of constant steps at both levels.

    Its iterations are of another kind (S-TFBO's have one lower step), so "iteration" is the share of that cost. The
    task's losses have to read `upper` and `lower` from their lists, as all do that have no network.
    """
    settings = task.settings
    products = settings.solver_steps if settings.solver != "identity" else 0
    budget = settings.iterations * Counts(gradients=settings.lower_steps + 2, hvps=products, jvps=1).cost
    generator = torch.Generator().manual_seed(seed)

    def pairs() -> Iterator[Any]:
        while True:
            yield task.sample_upper(generator), task.sample_lower(generator)

    problem = BilevelProblem(at(task, task.upper_loss), at(task, task.lower_loss))
    records = methods_run(
        name, problem, task.upper, task.lower, iterations=100 * settings.iterations, batches=pairs(), **options
    )
    run.evaluate(0, task.evaluate())
    evaluated, started = 0, time.process_time()
    for record in records:
        reached = min(settings.iterations, int(settings.iterations * record.total_cost / budget))
        run.step_sizes.append(record.steps.upper)
        run.lower_step_sizes.append(record.steps.lower)
        if reached >= evaluated + settings.evaluate_every or reached == settings.iterations:
            run.seconds += time.process_time() - started
            task.upper[:], task.lower[:] = record.x, record.y
            last = task.resolve() if reached == settings.iterations else {}
            run.evaluate(reached, {**task.evaluate(), **last})
            run.cost = {"lower": record.total.lower.cost, "hypergradient": 0.0, "upper": record.total.upper.cost}
            evaluated = reached
            yield run
            if reached == settings.iterations or run.hopeless():
                return
            started = time.process_time()


def train_single(
    task: SingleLevelTask, optimizer: torch.optim.Optimizer, step: SingleStep, seed: int, run: Run
) -> Iterator[Run]:
    """Runs the task's iterations, yielding at each evaluation; two-sample rules get a second, independent batch."""
    settings = task.settings
    generator = torch.Generator().manual_seed(seed)
    second_generator = torch.Generator().manual_seed(seed + 10_000)
    run.evaluate(0, task.evaluate())
    for iteration in range(1, settings.iterations + 1):
        started = time.process_time()
        closure = partial(task.loss, task.sample(generator))
        step(closure, partial(task.loss, task.sample(second_generator)))
        run.seconds += time.process_time() - started
        run.note(optimizer)
        if iteration % settings.evaluate_every == 0 or iteration == settings.iterations:
            run.evaluate(iteration, task.evaluate())
            run.cost = {"lower": 0.0, "hypergradient": 0.0, "upper": cost(optimizer, gradients=iteration)}
            yield run
            if run.hopeless():
                return
