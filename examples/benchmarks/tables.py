"""Tables of results: rows of a suite, in the terminal, on the site, and in `docs/benchmarks.md`. Plain Python.

python examples/benchmarks/tables.py   # writes the tables of all tasks into docs and EVIDENCE.md
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
EVIDENCE = Path(__file__).parent / "EVIDENCE.md"
RESOLVED = "last_resolved_loss"
TASKS = {
    "hyper-cleaning": "40 % wrong labels",
    "hyper-cleaning-60": "60 % wrong labels",
    "hyper-cleaning-fashion": "40 %, Fashion-MNIST",
    "hyper-cleaning-fashion-60": "60 %, Fashion-MNIST",
    "hyper-cleaning-minibatch": "40 %, batches of 128",
    "hyper-cleaning-fashion-minibatch": "40 %, batches of 128, Fashion-MNIST",
    "distillation": "T = 20",
    "distillation-cg": "CG",
    "distillation-identity": "identity",
    "distillation-50": "T = 50, Neumann",
    "distillation-28": "28x28, Neumann",
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
NETWORKS = {
    "label-noise": "40 % wrong labels",
    "label-noise-minibatch": "",
    "label-noise-tanh": "two tanh layers",
    "label-noise-tanh-minibatch": "",
    "meta-weight": "a network that weighs losses",
    "meta-weight-minibatch": "",
    "weight-decay-tensor": "",
    "weight-decay-tensor-minibatch": "",
    "weight-decay-layer": "",
    "weight-decay-layer-minibatch": "",
    "smoothing": "of labels, and noise of inputs",
    "smoothing-minibatch": "",
    "architecture-minibatch": "a cell of three edges",
    "start-of-few-shot": "Omniglot",
}
"""Those with a network at the lower level, in the order of their table."""


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
        rows = _content(results, name)["rows"]
        ours = [_least(rows, "ours", method) for method in ("bisls-adam", "bisls-sgd", "bisps")]
        losses = [*ours, _least(rows, "grid", "adam"), _least(rows, "grid", "sgd"), _least(rows, "other")]
        shown = list(map(_short, losses))
        best = shown[losses.index(min(losses))]
        link = f"[`{name}`](../examples/benchmarks/results/{name}.json)"
        lines.append([f"{link}, {note}", *(f"**{loss}**" if loss == best else loss for loss in shown)])
    return markdown(lines)


def networks(results: Path = RESULTS) -> str:
    """Return the table of tasks with a network below: f / F of ours, and the least f and F of all grids."""
    lines = [["task", "BiSLS-Adam", "BiSLS-SGD", "best f of all grids", "best F of all grids"]]
    ratios: dict[str, list[float]] = {}
    for name, note in NETWORKS.items():
        rows = _content(results, name)["rows"]
        grid = [row for row in rows if row["kind"] == "grid"]
        best = [min(grid, key=_loss), min(grid, key=_resolved)]
        least = _loss(best[0]), _resolved(best[1])
        line = [f"`{name}`, {note}" if note else f"`{name}`"]
        for method in ("bisls-adam", "bisls-sgd"):
            row = _ours(rows, method)
            own = _loss(row), _resolved(row)
            shown = [f"**{_short(a)}**" if a <= b else _short(a) for a, b in zip(own, least, strict=True)]
            line.append(" / ".join(shown))
            for figure, a, b in zip("fF", own, least, strict=True):
                ratios.setdefault(f"{method} {figure}", []).append(a / b)
        shown = [_point(row["label"]) for row in best]
        if best[0] is best[1]:
            shown[1] = "the same"
        lines.append([*line, *(f"{_short(a)} ({point})" for a, point in zip(least, shown, strict=True))])
    means = [_short(geometric_mean(of)) for of in ratios.values()]
    lines.append(["geometric mean over the best", " / ".join(means[:2]), " / ".join(means[2:]), "", ""])
    return markdown(lines)


def defaults(results: Path = RESULTS) -> str:
    """Return the table of the convex tasks that were run with the package's own hypergradient."""
    head = ["task", "method", "f (F)", "f, F over own", "f, F over all", "time over own"]
    lines = [[*head, "cost", "first trials", "trials"]]
    for name in TASKS:
        content = _content(results, name)
        if content["settings"].get("solver") != "default":
            continue
        found = _measured(content)
        for kind in ("adam", "sgd"):
            row = _ours(content["rows"], f"bisls-{kind}")
            rest = {bar.removeprefix(f"bisls-{kind}"): value for bar, value in found.items() if f"bisls-{kind}" in bar}
            best = [f", no number / best of {grid}: " for grid in (f"the {kind} grid", "all grids")]
            losses = [[value for bar, value in rest.items() if bar in (f"{own}f(x, y)", f"{own}F(x)")] for own in best]
            (trials,) = (value for bar, value in rest.items() if bar.startswith(", first trials"))
            time = rest[f", no number / best of the {kind} grid: seconds to its final loss"]
            cost = rest[" / its lower loop and hypergradient: cost of an iteration"]
            lines.append(
                [
                    f"`{name}`" if kind == "adam" else "",
                    {"adam": "BiSLS-Adam", "sgd": "BiSLS-SGD"}[kind],
                    f"{_short(_loss(row))} ({_short(_resolved(row))})",
                    *(", ".join(_held(value, 1.0) for value in pair) for pair in losses),
                    _held(time, 1.0),
                    _held(cost, 1.15),
                    f"{trials:.3f}",
                    f"{row['trials_per_iteration']:.2f}",
                ]
            )
    return markdown(lines)


def _held(value: float, most: float) -> str:
    """Return a number with three digits behind the point, bold where it is not above its bar."""
    if not math.isfinite(value):
        return "not reached"
    shown = f"{value:.3f}".removeprefix("0")
    return f"**{shown}**" if value <= most else shown


def _content(results: Path, name: str) -> Row:
    content: Row = json.loads((results / f"{name}.json").read_text())
    return content


def _measured(content: Row) -> dict[str, float]:
    return {entry["bar"]: number(entry["measured"]) for entry in content["bars"]}


def _ours(rows: Sequence[Row], method: str) -> Row:
    (row,) = (row for row in rows if row["kind"] == "ours" and row["method"].split()[0] == method)
    return row


def _loss(row: Row) -> float:
    return number(row["median"])


def _resolved(row: Row) -> float:
    return _median(row[RESOLVED])


def _point(label: str) -> str:
    """Return a grid point in words: 'adam lr=0.01 lower=1 solver=unroll' is 'Adam .01, unrolled, SGD 1 below'."""
    name, *options = label.split()
    given = dict(option.split("=", 1) for option in options)
    words = [f"{'Adam' if name == 'adam' else 'SGD'} {given['lr'].removeprefix('0')}"]
    if "solver" in given:
        words.append({"neumann": "Neumann", "unroll": "unrolled"}[given["solver"]])
    if "lower" in given:
        words.append(f"SGD {given['lower'].removeprefix('0')} below")
    return ", ".join(words)


def speed(names: Iterable[str], results: Path = RESULTS) -> str:
    """Return the table of the time to the loss of the best grid point, over that point's own time.

    The last line has the geometric means, and the tasks on which ours are as fast at least. A run that does not reach
    the loss counts as slower, and is no part of the mean.
    """
    head = ["task (`NAME`)", "Adam: time", "whole grid", "iteration", "SGD: time", "whole grid", "iteration"]
    lines, figures = [head], []
    for name in names:
        found = _measured(_content(results, name))
        figures.append([_bar(found, kind, *words) for kind in ("adam", "sgd") for words in _SPEED])
        lines.append([f"[`{name}`](../examples/benchmarks/results/{name}.json)", *map(_short, figures[-1])])
    columns = zip(*figures, strict=True)
    last = [_short(geometric_mean(filter(math.isfinite, column))) for column in columns]
    for place in (0, 3):
        times = [row[place] for row in figures]
        last[place] += f"; {sum(t <= 1.0 for t in times)} of {len(times)}"
    return markdown([*lines, ["geometric mean", *last]])


_SPEED = (
    ("bisls-{0}, no number / best of the {0} grid: seconds to its final loss",),
    ("the {0} grid / one run of bisls-{0}: seconds",),
    ("bisls-{0} / its lower loop and hypergradient: cost of an iteration",
     "bisls-{0} / a constant step at both levels: cost of an iteration"),
)  # fmt: skip
"""The bars of a column; the second is that of results which were made before the first was counted."""


def _bar(found: dict[str, float], kind: str, *words: str) -> float:
    return next(found[bar] for bar in (word.format(kind) for word in words) if bar in found)


def _short(value: float) -> str:
    return f"{value:#.3g}".removeprefix("0").removesuffix(".") if math.isfinite(value) else "-"


def _least(rows: Sequence[Row], kind: str, method: str = "") -> float:
    """Return the least median loss of the rows of a kind whose method has this name."""
    of = [row for row in rows if row["kind"] == kind and method in ("", row["method"].split()[0])]
    return min(map(_loss, of))


def _median(values: Sequence[float | None] | None) -> float:
    return median(map(number, values)) if values else math.nan


MARKED = (
    (DOCS / "benchmarks.md", "tasks", overview),
    (DOCS / "benchmarks.md", "networks", networks),
    (EVIDENCE, "defaults", defaults),
    (DOCS / "speed.md", "tasks", lambda: speed(TASKS)),
    (DOCS / "speed.md", "networks", lambda: speed(NETWORKS)),
)
"""Where the tables stand: page, mark, and what makes the table."""


def between(page: str, mark: str) -> re.Match[str] | None:
    """Return the part of a page that begins with a mark: (line of the mark, table, line of the end)."""
    return re.search(rf"(<!-- tables\.py: {mark} -->\n)(.*?)(<!-- end -->)", page, re.DOTALL)


if __name__ == "__main__":
    for path, mark, table in MARKED:
        page = path.read_text()
        found = between(page, mark)
        assert found is not None, f"{path.name} has no mark {mark}"
        path.write_text(f"{page[: found.start(2)]}{table()}\n{page[found.end(2) :]}")
