"""Run every algorithm of `adaptive_bilevel.methods` on two problems, at equal oracle cost.

    python examples/compare_methods.py                 # a quadratic, and scikit-learn's digits; about two minutes
    python examples/compare_methods.py --data DIR      # MNIST in the place of the digits

The quadratic has a known solution. Data cleaning weighs 500 training images, 40 % of which have a label drawn at
random, so that softmax regression fitted to them does well on 250 clean ones. Each algorithm may spend the same number
of oracle calls (a gradient counts 1, a value .35, a Hessian-vector product 2.2, a mixed product 1), and is judged by
F(x) = f(x, y*(x)), the lower problem being solved anew, which costs it nothing.

Fixed and decaying steps are told the lower step, 1 / (largest eigenvalue of the lower Hessian at the start), and get
the best of three upper steps. Tuning-free and adaptive rows are told nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptive_bilevel import methods, policies
from adaptive_bilevel.hypergradient import DARTS, Implicit, Neumann, UnrollForward

RIDGE, NOISE = 1e-3, 0.4
POINTS = 8  # of a curve
SEARCHED = {"upper_step": policies.SLS(), "lower_step": policies.SLS()}
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {  # any row takes adaptive steps
    "stocbio + searches": ("stocbio", SEARCHED),
    "soba + searches": ("soba", {**SEARCHED, "auxiliary_step": policies.SLS(start=1.0, lower_bound=None)}),
}


@dataclass
class Task:
    """A problem with what the comparison needs to know of it.

    Attributes:
        name: For titles.
        problem: The two losses.
        start: x_0 and y_0.
        judge: x -> (F(x) in the table's unit, another score).
        smoothness: Largest eigenvalue of the lower Hessian at the start.
        steps: Upper steps to choose from, where a row needs one.
        budget: Oracle calls, in gradients.
        scores: Names of what `judge` returns.
    """

    name: str
    problem: methods.BilevelProblem
    start: tuple[Tensor, Tensor]
    judge: Callable[[Tensor], tuple[float, float]]
    smoothness: float
    steps: tuple[float, ...]
    budget: float
    scores: tuple[str, str]


@dataclass
class Result:
    """How a row fared: the last scores, the chosen step, the iterations, and F over the cost."""

    score: float
    second: float
    step: float | None
    iterations: int
    seconds: float
    curve: list[tuple[float, float]] = field(default_factory=list)


def quadratic(budget: float) -> Task:
    """With y*(x) = Ax + b: g = (y - y*)' H (y - y*) / 2, f = ||y - t||^2 / 2 + .05 ||x||^2; d_x = 5, d_y = 10."""
    rng = torch.Generator().manual_seed(1)
    A, b, t = (torch.randn(*size, generator=rng) for size in ((10, 5), (10,), (10,)))
    M = torch.randn(10, 10, generator=rng)
    H = M @ M.T / 10 + 0.2 * torch.eye(10)

    def f(x: Tensor, y: Tensor, _: None) -> Tensor:
        return 0.5 * (y - t).square().sum() + 0.05 * x.square().sum()

    def g(x: Tensor, y: Tensor, _: None) -> Tensor:
        gap = y - A @ x - b
        return 0.5 * gap @ H @ gap

    def F(x: Tensor) -> float:
        return float(f(x, A @ x + b, None))

    best = torch.linalg.solve(A.T @ A + 0.1 * torch.eye(5), A.T @ (t - b))
    x0, y0 = torch.randn(5, generator=rng) * 2, torch.zeros(10)
    scale = F(x0) - F(best)
    return Task(
        "quadratic",
        methods.BilevelProblem(upper_loss=f, lower_loss=g),
        (x0, y0),
        lambda x: ((F(x) - F(best)) / scale, float((x - best).norm())),
        float(torch.linalg.eigvalsh(H)[-1]),
        (0.003, 0.03, 0.3),
        budget,
        ("(F-F*)/(F0-F*)", "|x-x*|"),
    )


def cleaning(folder: str | None, budget: float) -> Task:
    """Data cleaning on images pooled to 4x4 (digits) or 7x7 (MNIST), so that dense Hessians are possible, too."""
    sys.path.append(str(Path(__file__).parent / "benchmarks"))  # the benchmarks' reader
    from data import images

    content = images(folder)
    pooled = [torch.nn.functional.avg_pool2d(part[:, None], 2).flatten(1) for part in (content.x, content.test_x)]
    x, test = (torch.cat([part, torch.ones(len(part), 1)], 1).double() for part in pooled)
    train, clean = slice(0, 500), slice(1000, 1250)
    rng = torch.Generator().manual_seed(0)
    redrawn = torch.rand(500, generator=rng) < NOISE
    labels = torch.where(redrawn, torch.randint(10, (500,), generator=rng), content.y[train])

    def f(weights: Tensor, y: Tensor, _: None) -> Tensor:
        return cross_entropy(x[clean] @ y, content.y[clean])

    def g(weights: Tensor, y: Tensor, _: None) -> Tensor:
        losses = cross_entropy(x[train] @ y, labels, reduction="none")
        return (weights.sigmoid() * losses).mean() + RIDGE * y.square().sum()

    solved = torch.zeros(x.shape[1], 10)

    def judge(weights: Tensor) -> tuple[float, float]:
        nonlocal solved
        y = solved = lower_solution(lambda y: g(weights, y, None), solved)
        accuracy = ((test[:2000] @ y).argmax(1) == content.test_y[:2000]).double().mean()
        return float(f(weights, y, None)), float(accuracy)

    x0, y0 = torch.zeros(500), torch.zeros(x.shape[1], 10)
    smoothness = largest_eigenvalue(lambda y: g(x0, y, None), y0)
    problem = methods.BilevelProblem(upper_loss=f, lower_loss=g)
    steps = (100.0, 1000.0, 10000.0)
    return Task(
        f"data cleaning, {content.name}", problem, (x0, y0), judge, smoothness, steps, budget, ("F", "test acc.")
    )


def lower_solution(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimizer, by L-BFGS; `start` is where the last one was."""
    y = start.clone().requires_grad_()
    search = torch.optim.LBFGS([y], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(y)
        value.backward()
        return value

    search.step(closure)
    return y.detach()


def largest_eigenvalue(loss: Callable[[Tensor], Tensor], y: Tensor) -> float:
    """Of the Hessian, by 30 power iterations."""
    y = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y), y, create_graph=True)
    v, norm = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), 1.0
    for _ in range(30):
        (Hv,) = torch.autograd.grad(gradient, y, v / v.norm(), retain_graph=True)
        v, norm = Hv, float(Hv.norm())
    return norm


def told(row: methods.Row, task: Task, step: float) -> dict[str, Any]:
    """The numbers that a row needs: its constant or decaying steps, and the scale of a Neumann series."""
    b = 1.0 / task.smoothness
    options: dict[str, Any] = {}
    for name, value in (("upper_step", step), ("lower_step", b), ("auxiliary_step", b)):
        rule = getattr(row, name)
        if isinstance(rule, policies.Constant):
            options[name] = dataclasses.replace(rule, bound=value)
    if isinstance(row.upper_direction, methods.Adam) and "upper_step" in options:
        options["upper_step"] = policies.Constant(bound=0.03 * task.steps.index(step) + 0.01)  # Adam has its own scale
    if isinstance(row.lower, methods.PenalisedLoss) and not row.joint:
        lower_rule: Any = row.lower_step  # all of these rows have a bound
        options["lower_step"] = dataclasses.replace(lower_rule, bound=b / 2)  # it descends on f + lambda g
    if isinstance(row.estimator, UnrollForward):
        options["lower_steps"] = 2  # each costs d_x pairs of products
    if isinstance(row.estimator, DARTS):
        options["estimator"] = DARTS(step=b)
    solver = getattr(row.estimator, "solver", None)
    if isinstance(solver, Neumann):
        options["estimator"] = Implicit(dataclasses.replace(solver, scale=b))
    return options


def spend(row: methods.Row, task: Task, options: dict[str, Any]) -> tuple[list[tuple[float, Tensor]], int]:
    """Run a row until its budget is spent; returns (cost, x) at about `POINTS` costs, evenly in the logarithm."""
    kept, due, iterations = [(0.0, task.start[0])], task.budget ** (1 / POINTS), 0
    # A first estimate of the number of iterations serves D-TFBO, whose tolerance is 1 / iterations.
    run = methods.run(row, task.problem, *task.start, iterations=int(task.budget), tolerance=1e-2, **options)
    last = None
    for last in run:
        iterations += 1
        if last.total_cost >= due:
            kept.append((last.total_cost, last.x))
            while due <= last.total_cost:
                due *= task.budget ** (1 / POINTS)
        if last.total_cost >= task.budget:
            break
    if last is not None and kept[-1][1] is not last.x:
        kept.append((last.total_cost, last.x))
    return kept, iterations


def evaluate(name: str, row: methods.Row, task: Task, given: dict[str, Any]) -> Result:
    """Run a row, with the best of the upper steps where it needs one."""
    needs = isinstance(row.upper_step, policies.Constant) and "upper_step" not in given
    best: tuple[float, Result, list[tuple[float, Tensor]]] | None = None
    began = time.perf_counter()
    for step in task.steps if needs else task.steps[:1]:
        options = {**told(row, task, step), **given}
        kept, iterations = spend(row, task, options)
        score, second = task.judge(kept[-1][1])
        score = score if math.isfinite(score) else math.inf
        if best is None or score < best[0]:
            best = score, Result(score, second, step if needs else None, iterations, 0.0), kept
    assert best is not None
    result = dataclasses.replace(best[1], seconds=time.perf_counter() - began)
    result.curve = [(cost, task.judge(x)[0]) for cost, x in best[2]]
    return result


def table(results: dict[str, dict[str, Result]], tasks: Iterable[Task]) -> str:
    """One line per row, both problems beside each other, in Markdown."""
    tasks = list(tasks)
    head = ["row"]
    for task in tasks:
        head += [f"{task.name}: {task.scores[0]}", task.scores[1], "upper step", "iterations"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, by_task in results.items():
        cells = [name]
        for task in tasks:
            r = by_task[task.name]
            cells += [
                f"{r.score:.3g}",
                f"{r.second:.3g}",
                "none" if r.step is None else f"{r.step:g}",
                str(r.iterations),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Result]], tasks: list[Task], path: Path) -> None:
    """F over the cost: rows that were told no step in colour; of the others the best four (and their step) dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(12, 4.6), layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        bottom = min(r[task.name].score for r in results.values())
        told_rows = sorted((r[task.name].score, n) for n, r in results.items() if r[task.name].step is not None)
        shown = {name for _, name in told_rows[:4]}
        colors = iter(plt.get_cmap("tab10")(range(10)))
        greys = iter(plt.get_cmap("Greys")([0.85, 0.7, 0.55, 0.45]))
        for name, by_task in results.items():
            result = by_task[task.name]
            costs, values = zip(*[(c, v) for c, v in result.curve if c > 0 and math.isfinite(v)], strict=True)
            if result.step is None:
                axis.plot(costs, values, color=next(colors), lw=2, label=f"{name}")
            elif name in shown:
                axis.plot(costs, values, color=next(greys), lw=1.5, ls="--", label=f"{name} ({result.step:g})")
            else:
                axis.plot(costs, values, color="0.85", lw=0.7, zorder=0)
        axis.set(
            xscale="log", yscale="log", xlabel="oracle calls, in gradients", ylabel=task.scores[0], title=task.name
        )
        if task.name == "quadratic":
            axis.set_ylim(bottom * 0.5, 3)
        else:
            axis.set_ylim(bottom * 0.85, task.judge(task.start[0])[0] * 1.2)
        axis.set_xlim(right=task.budget * 1.3)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="lower left", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST (npz or idx files) in place of the digits")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--budget", type=float, default=800.0, help="oracle calls of a run, in gradients")
    parser.add_argument("--output", type=Path, default=Path("compare_methods"), help="stem of the .png, .md and .json")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the matrices are small
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # steps that fail show in the table
    tasks = [quadratic(options.budget), cleaning(options.data, options.budget)]
    rows: dict[str, tuple[methods.Row, dict[str, Any]]] = {name: (methods.row(name), {}) for name in methods.names()}
    rows |= {name: (methods.row(base), given) for name, (base, given) in EXTRA.items()}
    chosen = {name: pair for name, pair in rows.items() if not options.rows or name in options.rows}
    results: dict[str, dict[str, Result]] = {}
    for name, (row, given) in chosen.items():
        results[name] = {task.name: evaluate(name, row, task, given) for task in tasks}
        shown = "   ".join(f"{t.name} {results[name][t.name].score:.3g}" for t in tasks)
        print(f"{name:<20} {sum(r.seconds for r in results[name].values()):5.1f} s   {shown}", flush=True)
    text = table(results, tasks)
    print("\n" + text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text + "\n")
    plain = {n: {t: dataclasses.asdict(r) for t, r in by_task.items()} for n, by_task in results.items()}
    options.output.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n")
    draw(results, tasks, options.output.with_suffix(".png"))
    print(f"\n{options.output}.png, .md and .json")


if __name__ == "__main__":
    main()
