"""Tables of results: rows of a suite, in the terminal, on the site, and in `docs/benchmarks.md`. Plain Python.

python examples/benchmarks/tables.py   # writes the table of all tasks into docs/benchmarks.md
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- tables.py: tasks -->\n).*(<!-- end -->)", re.DOTALL)
RESOLVED = "last_resolved_loss"
TASKS = {
    "hyper-cleaning": "40 % wrong labels",
    "hyper-cleaning-60": "60 % wrong labels",
    "hyper-cleaning-fashion": "40 %, Fashion-MNIST",
    "hyper-cleaning-fashion-60": "60 %, Fashion-MNIST",
    "hyper-cleaning-minibatch": "40 %, batches of 128",
    "hyper-cleaning-fashion-minibatch": "40 %, batches of 128, Fashion-MNIST",
    "distillation": "Neumann",
    "distillation-cg": "CG",
    "distillation-identity": "identity",
    "distillation-50": "T = 50",
    "distillation-28": "28x28",
    "penalties-a9a": "one penalty per feature",
    "penalties-news20": "one penalty per feature",
    "logistic-a9a": "one penalty",
    "ridge-a9a": "one penalty",
    "hyper-representation": "MLP, 14x14",
    "hyper-representation-cg10": "CG 10",
    "hyper-representation-lenet": "28x28, CG 3",
    "hyper-representation-lenet-cg10": "28x28, CG 10",
    "few-shot": "Omniglot, 5 ways, 5 shots",
}
"""The bilevel tasks of the overview, in its order."""


def number(value: float | None) -> float:
    """Return a number of a result file, in which infinity is written as null."""
    return math.inf if value is None else float(value)


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are aligned; the first line is the head."""
    head, *body = [list(line) for line in lines]
    body.insert(0, ["-" * max(3, len(word)) for word in head])
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(f"{w:<{n}}" for w, n in zip(line, widths, strict=True)) + " |" for line in (head, *body)
    )


def text(rows: Sequence[Row]) -> str:
    """Return the table of all rows of one benchmark, for a terminal or a page of Markdown."""
    resolved, accuracy = any(RESOLVED in row for row in rows), any("accuracy" in row for row in rows)
    head = ["method", "loss", "[min, max]"] + ["F(x)"] * resolved + ["accuracy"] * accuracy
    lines = [[*head, "diverged", "trials", "failed", "first", "products", "cost", "seconds"]]
    for row in rows:
        least, most = number(row["min"]), number(row["max"])
        line = [row["label"], f"{number(row['median']):.4g}", f"[{least:.4g}, {most:.4g}]"]
        line += [f"{_median(row.get(RESOLVED)):.4g}"] * resolved
        line += [f"{_median(row.get('accuracy')):.3f}"] * accuracy
        line += [f"{row['diverged']}/{len(row['seeds'])}", f"{row['trials_per_iteration']:.2f}", f"{row['failed']:.2f}"]
        line += [" ".join(dict.fromkeys(row.get("first", ()))), f"{row.get('products_per_iteration', math.nan):.1f}"]
        lines.append([*line, f"{row['cost_per_iteration']:.1f}", f"{row['seconds']:.2f}"])
    return markdown(lines)


def bars(entries: Sequence[Row]) -> str:
    """Return the table of a benchmark's bars, those that fail included."""
    lines = [["bar", "measured", "at most", ""]]
    for entry in entries:
        verdict = {True: "holds", False: "**fails**", None: ""}[entry.get("holds")]
        limit = f"{entry['at most']:g}" if "at most" in entry else ""
        lines.append([entry["bar"], f"{number(entry['measured']):.4g}", limit, verdict])
    return markdown(lines)


def overview(results: Path = RESULTS) -> str:
    """Return the table of all bilevel tasks: ours without a number, the best of each grid, the best other method."""
    lines = [["task (`NAME`)", "BiSLS-Adam", "BiSLS-SGD", "BiSPS", "best Adam", "best SGD", "best other"]]
    for name, note in TASKS.items():
        rows = json.loads((results / f"{name}.json").read_text())["rows"]
        ours = [_least(rows, "ours", method) for method in ("bisls-adam", "bisls-sgd", "bisps")]
        losses = [*ours, _least(rows, "grid", "adam"), _least(rows, "grid", "sgd"), _least(rows, "other")]
        shown = [f"{loss:#.3g}".removeprefix("0").removesuffix(".") for loss in losses]
        best = shown[losses.index(min(losses))]
        link = f"[`{name}`](../examples/benchmarks/results/{name}.json)"
        lines.append([f"{link}, {note}", *(f"**{loss}**" if loss == best else loss for loss in shown)])
    return markdown(lines)


def _least(rows: Sequence[Row], kind: str, method: str = "") -> float:
    """Return the least median loss of the rows of a kind whose method has this name."""
    of = [row for row in rows if row["kind"] == kind and method in ("", row["method"].split()[0])]
    return min(number(row["median"]) for row in of)


def _median(values: Sequence[float | None] | None) -> float:
    return median(map(number, values)) if values else math.nan


if __name__ == "__main__":
    PAGE.write_text(MARKED.sub(lambda marks: f"{marks[1]}{overview()}\n{marks[2]}", PAGE.read_text()))
