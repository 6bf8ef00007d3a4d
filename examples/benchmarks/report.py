"""Tables and figures of the suite, from the content of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import bars
from benchmark import Benchmark
from runs import Method, provenance
from tables import RESOLVED, text

Row = dict[str, Any]
SEARCHED = (("lower", "search"), ("lower", "auto"))
COPIED = ("accuracy", "test_loss", "last_resolved_accuracy", "last_resolved_test_loss")


class Table:
    """The runs of a benchmark by method and seed, and what they come to."""

    def __init__(self, benchmark: Benchmark, runs: Sequence[Row], missing: dict[str, str]) -> None:
        self.benchmark, self.missing = benchmark, missing
        self.tried: dict[str, list[Method]] = {}
        self._runs: dict[str, dict[int, Row]] = {}
        self.add(runs)

    def add(self, runs: Sequence[Row]) -> None:
        for run in runs:
            self._runs.setdefault(str(Method(run["method"], run["options"])), {})[run["seed"]] = run

    @property
    def figures(self) -> list[str]:
        """By which the best of a grid is chosen: f(x, y), and F(x) where it is known."""
        known = any(RESOLVED in run["summary"] for seeds in self._runs.values() for run in seeds.values())
        return ["loss", RESOLVED] if known and self.benchmark.resolved else ["loss"]

    def of(self, method: Method) -> list[Row]:
        """The runs of a method, by seed."""
        found = self._runs.get(str(method), {})
        return [found[seed] for seed in sorted(found)]

    def score(self, method: Method, seeds: Sequence[int], figure: str = "loss") -> float:
        """The median over these seeds; infinite where one diverged or is missing."""
        found = self._runs.get(str(method), {})
        return median(_value(found[seed], figure) if seed in found else math.inf for seed in seeds)

    def best(self, label: str, figure: str = "loss") -> Method:
        """The best of a grid, of those that all seeds were run with."""
        seeds = self.benchmark.seeds
        complete = [m for m in self.tried[label] if len(self.of(m)) == len(seeds)]
        return min(complete, key=lambda m: self.score(m, seeds, figure))

    def named(self, texts: Sequence[str]) -> list[Method]:
        methods = [Method.parse(text) for text in texts]
        return [method for method in methods if self.of(method)]

    def every(self, key: str) -> Any:
        """What the runs have under a key: one value, or a list of all."""
        found = sorted({run[key] for seeds in self._runs.values() for run in seeds.values()}, key=str)
        return found[0] if len(found) == 1 else found

    def grid_seconds(self, label: str) -> float:
        """What all runs of a grid cost."""
        return sum(run["summary"]["seconds"] for method in self.tried[label] for run in self.of(method))

    def seconds_to(self, method: Method, target: float) -> float:
        """Median over seeds of the processor time until an evaluation is at the target or below."""
        return median(
            min((e["seconds"] for e in run["evaluations"] if e["loss"] <= target), default=math.inf)
            for run in self.of(method)
        )

    def rows(self, methods: Sequence[Method], kind: str = "") -> list[Row]:
        return [self._row(method, kind) for method in methods]

    def _row(self, method: Method, kind: str) -> Row:
        runs = self.of(method)
        summaries = [run["summary"] for run in runs]
        losses = [finite(summary["loss"]) for summary in summaries]
        middle = {
            key: median(finite(summary[key]) for summary in summaries)
            for key in ("trials_per_iteration", "products_per_iteration", "cost_per_iteration", "seconds")
            if all(key in summary for summary in summaries)
        }
        return {
            "label": label(method),
            "kind": kind,
            "method": str(method),
            "seeds": [run["seed"] for run in runs],
            "median": median(losses),
            "min": min(losses),
            "max": max(losses),
            "loss": losses,
            **{
                key: [finite(s.get(key, math.inf)) for s in summaries]
                for key in (RESOLVED, *COPIED)
                if any(key in s for s in summaries)
            },
            "diverged": sum(summary["diverged"] for summary in summaries),
            "failed": sum(summary["failed"] for summary in summaries) / len(runs),
            "moved": sum(summary["moved"] for summary in summaries) / len(runs),
            "first": [summary.get("first", "") for summary in summaries],
            **middle,
        }

    def renewable(self) -> list[Row]:
        """Our searches with no number, with what `renewal.renewed` needs beside their rows."""
        methods = [method for method in self.named(self.benchmark.ours) if method.name.startswith("bisls")]
        rows = zip(methods, self.rows(methods, "ours"), strict=True)
        return [{**row, "cost_over_loop": self.cost_over_loop(method)} for method, row in rows]

    def cost_over_loop(self, method: Method) -> float:
        """Median over seeds of the cost of all calls of a run over that of its lower loop and hypergradients."""
        costs = [run["cost"] for run in self.of(method)]
        return median(sum(cost.values()) / (cost["lower"] + cost["hypergradient"]) for cost in costs)

    def all_rows(self) -> list[Row]:
        """Ours, the best of each grid by each figure, the others, the first trials."""
        benchmark = self.benchmark
        rows = self.rows(self.named(benchmark.ours), "ours")
        for grid in benchmark.grids:
            chosen = dict.fromkeys(str(self.best(grid.label, figure)) for figure in self.figures)
            for name in chosen:
                (row,) = self.rows([m for m in self.tried[grid.label] if str(m) == name], "grid")
                row["grid"] = {"points": len(self.tried[grid.label]), "seconds": self.grid_seconds(grid.label)}
                rows.append(row)
        rows += self.rows(self.named(benchmark.others), "other")
        return rows + self.rows(self.named(benchmark.first_trials), "first trial")


# Output.


def label(method: Method) -> str:
    """A row's name; that ours search at the lower level too goes without saying."""
    shown = {key: value for key, value in method.options.items() if (key, value) not in SEARCHED}
    if method.name in ("adam", "sgd") and "lower" in method.options:
        shown = method.options
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()]
    return " ".join([method.name, *words])


def publish(table: Table, name: str, results: Path, source: dict[str, str]) -> None:
    """Prints the table and the bars, and writes NAME.json and NAME.png."""
    quick = table.benchmark.title.endswith("(quick)")
    rows, held = table.all_rows(), [] if quick else bars.of(table)  # after four iterations they say nothing
    some = next(run for method in table.named(table.benchmark.ours) for run in table.of(method))
    write(results / f"{name}.json", {
        "title": table.benchmark.title,
        **source,
        **{key: table.every(key) for key in provenance()},
        "settings": some["settings"],
        **({"skipped": table.missing} if table.missing else {}),
        "bars": held,
        "rows": rows,
        "grids": [
            {"grid": key, **{label(m): table.score(m, [table.of(m)[0]["seed"]]) for m in methods if table.of(m)}}
            for key, methods in table.tried.items()
        ],
    })  # fmt: skip
    draw(results / f"{name}.png", table, rows)
    print(f"\n{name}: {table.benchmark.title}\n{text(rows)}")
    for entry in held:
        if "holds" in entry:
            print(f"  {'holds' if entry['holds'] else 'FAILS'}  {entry['bar']}: {entry['measured']:.4g} "
                  f"(at most {entry['at most']:g})", flush=True)  # fmt: skip
        else:
            print(f"         {entry['bar']}: {entry['measured']:.4g}", flush=True)


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON with five digits and a line per row; what is not finite is written as null."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}") if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value

    lines = []
    for key, value in content.items():
        entry = json.dumps(rounded(value))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entry = "[\n" + ",\n".join(f"  {json.dumps(rounded(line))}" for line in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {entry}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


COLOURS: list[Any] = [pyplot.colormaps["tab10"](i) for i in range(10)]
DASHES = {"ours": "-", "grid": "--", "other": ":"}


def draw(path: Path, table: Table, rows: Sequence[Row]) -> None:
    """Left: median loss against iterations. Right: the final loss of each row, its range, and all points of a grid."""
    shown = [row for row in rows if math.isfinite(row["median"])]
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.2, 0.3 * len(shown) + 1.6)))
    curves = [row for row in shown if row["kind"] in DASHES]
    colours = {row["label"]: COLOURS[i % len(COLOURS)] for i, row in enumerate(curves)}
    start = 1.0
    for row in curves:
        curve = median_curve(table._runs[row["method"]].values())
        start = curve[0][1]
        colour, dash = colours[row["label"]], DASHES[row["kind"]]
        left.plot(*zip(*curve, strict=True), dash, color=colour, linewidth=1.6, label=row["label"])
    left.set(yscale="log", xlabel="(upper) iterations", ylabel="loss, median over seeds")
    left.set_ylim(top=min(left.get_ylim()[1], 2 * start))
    left.legend(fontsize=7)
    left.grid(alpha=0.25)
    top = max(1.5 * start, 2 * min(row["median"] for row in shown))
    for i, row in enumerate(shown):
        colour = colours.get(row["label"], "tab:gray")
        right.plot([row["min"], min(row["max"], top)], [i, i], color=colour, linewidth=4, alpha=0.4)
        right.plot([min(row["median"], top)], [i], "o" if row["median"] <= top else ">", color=colour, markersize=6)
        if RESOLVED in row:
            right.plot([min(median(row[RESOLVED]), top)], [i], "o", markerfacecolor="white", markeredgecolor=colour)
        if "grid" in row:
            key = next(k for k, methods in table.tried.items() if any(str(m) == row["method"] for m in methods))
            tried = [table.score(m, [table.of(m)[0]["seed"]]) for m in table.tried[key] if table.of(m)]
            right.plot([min(value, top) for value in tried], [i + 0.3] * len(tried), "|", color=colour, markersize=5)
    right.set(xscale="log", yticks=range(len(shown)), xlabel="final loss; hollow: F(x); ticks: all points of the grid")
    right.tick_params(axis="x", which="both", labelsize=7)
    right.set_yticklabels([_line(row) for row in shown], fontsize=7)
    right.invert_yaxis()
    right.grid(alpha=0.25, which="both")
    canvas.suptitle(table.benchmark.title, fontsize=11)
    canvas.tight_layout()
    canvas.savefig(path, dpi=85)
    pyplot.close(canvas)


def _line(row: Row) -> str:
    if "grid" in row:
        return f"{row['label']} (best of {row['grid']['points']})"
    return row["label"] + (", no number" if row["kind"] == "ours" else "")


def median_curve(runs: Any, key: str = "loss") -> list[tuple[float, float]]:
    """(iteration, median over the seeds), as far as all runs got."""
    points = zip(*(run["evaluations"] for run in runs), strict=False)
    return [(point[0]["iteration"], median(finite(entry[key]) for entry in point)) for point in points]


def _value(run: Row, figure: str) -> float:
    summary = run["summary"]
    return math.inf if summary["diverged"] else finite(summary.get(figure, math.inf))


def finite(value: float) -> float:
    """NaN counts as infinite: the worst."""
    return math.inf if math.isnan(value) else float(value)
