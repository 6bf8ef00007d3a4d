"""The experiments on real data that the project's figures come from: runs what is missing, then sums it up.

    python examples/benchmarks/evidence.py --data DIR --output RUNS [--only NAME ...]

DIR holds the data sets (see data.py). RUNS gets one file per run, written by run.py; runs whose file exists are not
repeated. What is kept is small: for each experiment a table over the seeds and the bars it is held against, as
``results/NAME.json``, and a picture, ``results/NAME.png``. "loss" of a run is the median of its last three evaluations,
"last_loss" the last one; tables give the median over the seeds and the range.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

import data
import run

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Bars = list[dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """One call of run.py: methods as on its command line, `settings` in the form key=value."""

    task: str
    methods: Sequence[str]
    settings: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)

    def run(self, folder: str, output: Path) -> None:
        methods = [word for method in self.methods for word in ("--method", method)]
        settings = ["--set", *self.settings] if self.settings else []
        seeds = ["--seeds", *map(str, self.seeds)]
        run.main([self.task, *methods, *settings, *seeds, "--data", folder, "--output", str(output)])

    def read(self, output: Path) -> list[list[Row]]:
        """The runs of each method, one per seed."""
        overrides = run.assignments(self.settings)
        methods = map(run.Method.parse, self.methods)
        names = ([run.file_name(self.task, method, overrides, seed) for seed in self.seeds] for method in methods)
        return [[json.loads((output / name).read_text()) for name in row] for row in names]


@dataclass(frozen=True)
class Experiment:
    """Sweeps, the figure of a run that counts, and the bars."""

    title: str
    sweeps: Sequence[Sweep]
    bars: Callable[[list[Row]], Bars]
    figure: str = "loss"


# Tables.


def label(method: str, options: dict[str, Any], overrides: dict[str, Any]) -> str:
    """A row's name, as in "bisls-adam carry=False T=1"."""
    shown = {"lower_steps": "T", "fresh_lower_batches": "fresh"}
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()]
    words += [f"{shown.get(key, key)}={value}" for key, value in overrides.items() if value is not True]
    return " ".join([method, *words])


def table_row(runs: list[Row], figure: str) -> Row:
    """One method over its seeds."""
    first, summaries = runs[0], [r["summary"] for r in runs]
    values = [finite(summary[figure]) for summary in summaries]
    outcomes: dict[str, int] = {}
    for r in runs:
        for name, count in r["outcomes"].items():
            outcomes[name] = outcomes.get(name, 0) + count
    others = [key for key in summaries[0] if key not in ("diverged", "trials_per_iteration", "seconds", figure)]
    return {
        "label": label(first["method"], first["options"], first["overrides"]),
        "method": first["method"],
        "options": first["options"],
        "overrides": first["overrides"],
        "seeds": [r["seed"] for r in runs],
        figure: values,
        "median": median(values),
        "min": min(values),
        "max": max(values),
        **{key: [finite(summary[key]) for summary in summaries] for key in others},
        "diverged": sum(summary["diverged"] for summary in summaries),
        "trials_per_iteration": median(summary["trials_per_iteration"] for summary in summaries),
        "outcomes": outcomes,
        "seconds": median(summary["seconds"] for summary in summaries),
    }


def finite(value: float) -> float:
    """NaN counts as infinite: the worst."""
    return math.inf if math.isnan(value) else value


def bar(text: str, measured: float, at_most: float) -> dict[str, Any]:
    return {"bar": text, "measured": measured, "at most": at_most, "holds": measured <= at_most}


def named(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row["label"] == name)


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
        text = json.dumps(rounded(value))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(rounded(entry))}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# The experiments.


def hyper_representation_bars(rows: list[Row]) -> Bars:
    chosen, swept = named(rows, "bisls-adam"), [r for r in rows if r["label"].startswith("bisls-adam lr=")]
    values = [r["median"] for r in swept]
    return [
        bar("bisls-adam, nothing given", chosen["median"], 0.060),
        bar("first trials 1e-2 to 1e4: largest / smallest", max(values) / min(values), 1.1),
        bar("nothing given / best of these", chosen["median"] / min(values), 1.05),
        bar("trials per iteration, at most", max(r["trials_per_iteration"] for r in [chosen, *swept]), 1.5),
    ]


def distillation_bars(rows: list[Row]) -> Bars:
    own = [r for r in rows if r["method"] == "bisls-sgd"]
    swept = max(r["max"] for r in own if r["options"])
    return [
        bar("bisls-sgd, first trials 1e2 to 1e6: worst run", swept, 0.75),
        bar("bisls-sgd, nothing given: worst run", named(own, "bisls-sgd")["max"], 0.75),
    ]


def hyper_cleaning_bars(rows: list[Row]) -> Bars:
    bars = []
    for method, limit in (("bisls-sgd", 0.15), ("bisls-adam", 0.10)):
        auto, always, never = (named(rows, f"{method} {c}T=1") for c in ("", "carry=True ", "carry=False "))
        resolved = [median(r["last_resolved_loss"]) for r in (auto, always, never)]
        bars += [
            bar(f"{method} T=1, carry auto: f(x, y)", auto["median"], limit),
            bar(f"{method} T=1, always carried: f(x, y)", always["median"], limit),
            bar(f"{method} T=1: F(x) of carry auto / the best of always and never", resolved[0] / min(resolved[1:]), 1),
        ]
    return bars


def carry_bars(rows: list[Row]) -> Bars:
    bars = []
    for method, steps in CARRIED:
        auto, never = named(rows, f"{method} T={steps}"), named(rows, f"{method} carry=False T={steps}")
        by_seed = max(a / b for a, b in zip(auto["loss"], never["loss"], strict=True))
        text = f"{method} T={steps}: carry auto / never"
        bars.append({**bar(text, auto["median"] / never["median"], 1.05), "largest ratio of a seed": by_seed})
    return bars


def w8a_bars(rows: list[Row]) -> Bars:
    others = min(r["median"] for r in rows if r["method"] in ("sgd", "sps-max", "decsps", "sls"))
    return [bar(f"{m} / best of the others", named(rows, f"{m} lr=1000")["median"] / others, 0.2) for m in BOUNDED]


FIRST_TRIALS = ("1e-2", "1", "1e2", "1e4")
CARRY = ("", ":carry=True", ":carry=False")
CARRIED = (("bisls-sgd", 1), ("bisls-adam", 1), ("bisls-adam", 3), ("bisls-adam", 10))  # (method, T)
BOUNDED = ("spsb", "slsb")

EXPERIMENTS = {
    "hyper_representation": Experiment(
        "Hyper-representation, MNIST 14x14, stochastic, CG 3: validation loss",
        [
            Sweep("hyper-representation", ["bisls-adam", *(f"bisls-adam:lr={lr}" for lr in FIRST_TRIALS)]),
            Sweep("hyper-representation", ["bisls-sgd", "adam:lr=1e-3", "adam:lr=4e-3"]),
            Sweep("hyper-representation", ["adam:lr=1e-4", "adam:lr=1e-2", "adam:lr=1e-1"], seeds=(0,)),
        ],
        hyper_representation_bars,
    ),
    "distillation": Experiment(
        "Data distillation, MNIST 14x14, T=20, Neumann: validation loss",
        [Sweep("distillation", ["bisls-sgd", *(f"bisls-sgd:lr={lr}" for lr in ("1e2", "1e4", "1e6"))]),
         Sweep("distillation", ["sgd:lr=20", "sgd:lr=40"])],
        distillation_bars,
    ),
    "hyper_cleaning": Experiment(
        "Data hyper-cleaning, MNIST 14x14, full batch, CG 10, T=5 unless said: validation loss",
        [
            Sweep(
                "hyper-cleaning",
                [*(f"{m}{c}" for m in ("bisls-sgd", "bisls-adam") for c in CARRY), "sgd:lr=1e3", "adam:lr=.1"],
                ["lower_steps=1"],
            ),
            Sweep("hyper-cleaning", ["bisls-sgd", "bisls-adam", "sgd:lr=1e3", "adam:lr=.1"]),
        ],
        hyper_cleaning_bars,
        figure="last_loss",
    ),
    "carry": Experiment(
        "Hyper-representation, a fresh batch for every lower step: validation loss",
        [Sweep("hyper-representation", [m, f"{m}:carry=False"], [f"lower_steps={T}", "fresh_lower_batches=True"])
         for m, T in CARRIED],
        carry_bars,
    ),
    "w8a": Experiment(
        "w8a, logistic loss, batch 100, 10 epochs, bound 1000: suboptimality of the last iterate",
        [Sweep("w8a", [f"{m}:lr=1000" for m in (*BOUNDED, "sgd", "sps-max", "decsps", "sls")]), Sweep("w8a", BOUNDED)],
        w8a_bars,
        figure="last_loss",
    ),
}  # fmt: skip


# Pictures.


def draw(path: Path, title: str, rows: list[Row], curves: list[list[tuple[float, float]]], figure: str) -> None:
    """Left: median loss against iterations. Right: the figure of each row, with its range over the seeds."""
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(12, max(3.6, 0.36 * len(rows) + 1.3)))
    start = curves[0][0][1]
    colours = pyplot.colormaps["tab20"].colors
    for i, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        colour, dash = colours[i % len(colours)], "-" if row["method"] not in ("sgd", "adam") else "--"
        left.plot(*zip(*curve, strict=True), dash, color=colour, linewidth=1.6)
        if math.isfinite(row["max"]):
            right.plot([row["min"], row["max"]], [i, i], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
        shown = min(row["median"], 3 * start)
        right.plot([shown], [i], "o" if shown == row["median"] else ">", color=colour, markersize=7)
        if "last_resolved_loss" in row:
            resolved = median(row["last_resolved_loss"])
            right.plot([resolved], [i], "o", markerfacecolor="white", markeredgecolor=colour, markersize=7)
        right.annotate(f"{row['median']:.3g}", (shown, i), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    left.set(yscale="log", xlabel="(upper) iterations", ylabel="median over seeds")
    left.set_ylim(top=min(left.get_ylim()[1], 3 * start))
    right.set(xscale="log", yticks=range(len(rows)), yticklabels=[row["label"] for row in rows])
    note = ", hollow: F(x) with the lower problem solved" if "last_resolved_loss" in rows[0] else ""
    right.set_xlabel({"loss": "median of the last three evaluations", "last_loss": "at the end"}[figure] + note)
    right.invert_yaxis()
    right.margins(x=0.12, y=0.08)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both" if axes is right else "major")
    for i, tick in enumerate(right.get_yticklabels()):
        tick.set_color([0.75 * channel for channel in colours[i % len(colours)]])
    canvas.suptitle(title, fontsize=11)
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    pyplot.close(canvas)


def median_curve(runs: list[Row]) -> list[tuple[float, float]]:
    """(iteration, median loss over the seeds), as far as all runs got."""
    points = zip(*(r["evaluations"] for r in runs), strict=False)
    return [(point[0]["iteration"], median(finite(e["loss"]) for e in point)) for point in points]


def options_of(description: str, names: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this script and of no_number.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (else the environment's)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args(arguments)
    options.data = data.folder(options.data)
    if options.data is None:
        parser.error(f"name the folder of the data sets: --data DIR, or the environment variable {data.VARIABLE}")
    return options


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    options = options_of(__doc__, list(EXPERIMENTS), arguments)
    for name in options.only:
        experiment = EXPERIMENTS[name]
        for sweep in experiment.sweeps:
            sweep.run(str(options.data), options.output)
        runs = [row for sweep in experiment.sweeps for row in sweep.read(options.output)]
        rows = [table_row(row, experiment.figure) for row in runs]
        bars = experiment.bars(rows)
        write(RESULTS / f"{name}.json", {
            "title": experiment.title,
            "command": f"python examples/benchmarks/evidence.py --data DIR --output RUNS --only {name}",
            **versions(),
            "figure": experiment.figure,
            "settings": runs[0][0]["settings"],
            "bars": bars,
            "rows": rows,
        })  # fmt: skip
        draw(RESULTS / f"{name}.png", experiment.title, rows, [median_curve(r) for r in runs], experiment.figure)
        for entry in bars:
            verdict = "holds" if entry["holds"] else "FAILS"
            print(f"  {verdict}  {entry['bar']}: {entry['measured']:.4g} (at most {entry['at most']:g})")


if __name__ == "__main__":
    main()
