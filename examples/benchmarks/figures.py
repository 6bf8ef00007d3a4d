"""The figures of Fan et al. (2023), arXiv 2305.18666, and further checks, on the tasks of this folder.

    python examples/benchmarks/figures.py [--figure NAME ...] [--data DIR] [--output RUNS] [--results DIR] [--quick]

Each figure is a list of panels, each panel a task, the methods on it, and what is drawn. Runs are kept in RUNS and not
repeated. A figure NAME becomes NAME.png and NAME.json, which has the final value of every curve. The paper trains LeNet
on 28x28 MNIST; "hyper-representation" here is the MLP on 14x14, which a CPU can repeat (``--set`` in suite.py for
LeNet). What holds and what does not is in EVIDENCE.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib import pyplot

import data
from report import finite, median_curve, write
from runs import Job, Method, provenance, run

Row = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Methods on a task.

    Attributes:
        title: of the panel.
        task: a name of `tasks`.
        methods: as on the command line of suite.py.
        settings: arguments and settings of the task.
        shown: what is drawn: "loss", "accuracy" or another evaluation against iterations; "step_sizes" or
            "lower_step_sizes" against iterations; "trials_per_iteration", a bar per method; "path" in the plane;
            or "picture", the upper variables of the first method.
        vary: a setting and its values, drawn along the horizontal axis with the final value along the other.
        final: which final value: a key of a run's summary.
        seeds: of the runs.
    """

    title: str
    task: str
    methods: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    shown: str = "loss"
    vary: tuple[str, Sequence[Any]] | None = None
    final: str = "loss"
    seeds: Sequence[int] = (0, 1, 2)

    def variants(self) -> list[dict[str, Any]]:
        if self.vary is None:
            return [dict(self.settings)]
        name, values = self.vary
        return [{**self.settings, name: value} for value in values]

    def labels(self) -> list[str]:
        """The methods, without the options that all of them have."""
        options = [text.partition(":")[2].split(",") for text in self.methods]
        own = [[o for o in given if len(options) == 1 or not all(o in other for other in options)] for given in options]
        return [" ".join([t.partition(":")[0], *o]).strip() for t, o in zip(self.methods, own, strict=True)]

    def quick(self) -> Panel:
        """Four iterations, one seed."""
        return replace(self, settings={**self.settings, "iterations": 4, "evaluate_every": 2}, seeds=self.seeds[:1])

    def jobs(self, text: str, settings: Mapping[str, Any]) -> list[Job]:
        """The runs of a method under one variant of the settings."""
        return [Job(self.task, dict(settings), Method.parse(text), seed) for seed in self.seeds]


def _over(method: str, option: str, values: Sequence[Any]) -> list[str]:
    return [f"{method}{'' if method.endswith(':') else ','}{option}={value}" for value in values]


REPRESENTATION = {"iterations": 100}
PAPER = "response=step,shrink=0.9,grow=2,lower=search"
DISTILLATION = {"iterations": 200}
IDENTITY = {"iterations": 200, "solver": "identity", "solver_scale": 1.0}
W8A = {"name": "w8a", "evaluate_every": 50}
QUADRATIC = {"iterations": 400}
QUADRATIC_METHODS = ("sgd:lr=10,decay=inverse_sqrt", "sps-max:lr=10", "decsps:lr=10", "spsb:lr=10",
                     "spsb:lr=10,two_sample=True", "slsb:lr=10")  # fmt: skip
W8A_METHODS = ("sgd:lr=1e3,decay=inverse_sqrt", "sps-max:lr=1e3", "decsps:lr=1e3", "sls:lr=1e3,c=0.5,reset=initial",
               "spsb:lr=1e3", "slsb:lr=1e3,reset=initial", "spsb")  # fmt: skip
TWO_SAMPLE = ("spsb:lr=1e3", "spsb:lr=1e3,two_sample=True", "slsb:lr=1e3,reset=initial",
              "slsb:lr=1e3,reset=initial,two_sample=True", "sgd:lr=1e3,decay=inverse_sqrt")  # fmt: skip
BEST_FIXED = ("adam:lr=4e-3,lower=search", "sgd:lr=.1,lower=search")
TUNING_FREE = ("bisls-sgd", "bisls-adam", "bisps", "s-tfbo", "d-tfbo:lower_steps=10,auxiliary_steps=10",
               "sgd:lr=0.1")  # fmt: skip
OURS = ("bisls-adam:lower=search", "bisls-sgd:lower=search")


def _bisps_against_sgd(bounds: Sequence[str]) -> list[str]:
    return [f"{name}lr={bound}" for bound in bounds for name in ("sgd:decay=inverse_sqrt,", "bisps:")]


def _samples(bounds: Sequence[str]) -> list[str]:
    return [f"{name}lr={bound}" for bound in bounds for name in ("sgd:decay=inverse_sqrt,", "bisps:", "bisps-2:")]


FIGURES: dict[str, list[Panel]] = {
    "fig03": [
        Panel("SGD, α = .005", "hyper-representation", _over("sgd:lr=0.005", "lower", (0.001, 0.01, 0.1, 1.0, 10.0)),
              REPRESENTATION),
        Panel("SGD, β = .01", "hyper-representation", _over("sgd:lower=0.01", "lr", (0.005, 0.05, 0.5, 5.0, 50.0)),
              REPRESENTATION),
        Panel("BiSLS-SGD, first trial", "hyper-representation",
              _over("bisls-sgd:lower=search", "lr", (0.005, 0.5, 50.0)), REPRESENTATION),
    ],
    "fig04": [Panel(title, "two-quadratics", QUADRATIC_METHODS, QUADRATIC, shown, seeds=(0,)) for title, shown in (
        ("value above the least", "loss"), ("distance to the minimizer", "distance"), ("step size", "step_sizes"),
        ("iterates", "path"))],
    "fig05": [Panel("w8a, bound 1000", "logistic-regression", W8A_METHODS, W8A),
              Panel("step size", "logistic-regression", W8A_METHODS, W8A, "step_sizes")],
    "fig06": [Panel("identity", "distillation", _bisps_against_sgd(("1", "10", "100")), IDENTITY),
              Panel("Neumann", "distillation", _bisps_against_sgd(("10", "100", "1e3")), DISTILLATION)],
    "fig07": [Panel("validation loss", "hyper-representation", (*OURS, *BEST_FIXED), REPRESENTATION),
              Panel("upper step size", "hyper-representation", OURS, REPRESENTATION, "step_sizes"),
              Panel("lower step size", "hyper-representation", OURS, REPRESENTATION, "lower_step_sizes")],
    "fig08": [
        Panel("search at both, one or no level", "hyper-representation",
              ("bisls-adam:lower=search", "bisls-adam:lower=0.1", "adam:lr=1e-3,lower=search",
               "adam:lr=1e-3,lower=0.1"), REPRESENTATION),
        Panel("test accuracy", "hyper-representation", (*OURS, *BEST_FIXED), REPRESENTATION, "accuracy"),
        Panel("BiSLS-Adam, first upper trial", "hyper-representation",
              _over("bisls-adam:lower=search", "lr", ("1e-2", "1", "1e2", "1e4")), REPRESENTATION),
        Panel("BiSLS-Adam, first lower trial", "hyper-representation", ("bisls-adam",), REPRESENTATION,
              vary=("lower_lr", (1.0, 10.0, 100.0, 1000.0))),
    ],
    "fig09": [
        Panel("Neumann", "distillation", ("bisls-sgd", "bisls-adam", "sgd:lr=20", "adam:lr=0.1"), DISTILLATION),
        Panel("identity", "distillation", ("bisls-sgd:response=step,baseline=matched,response_steps=20", "bisls-sgd",
              "sgd:lr=1", "adam:lr=0.1"), IDENTITY),
        Panel("distilled by BiSLS-SGD", "distillation", ("bisls-sgd",), DISTILLATION, "picture"),
        Panel("28x28", "distillation", ("bisls-sgd",), {"iterations": 200, "pooled": False}, "picture"),
    ],
    "fig10": [Panel(f"start {seed}", "two-quadratics", QUADRATIC_METHODS, QUADRATIC, "path", seeds=(seed,))
              for seed in range(4)],
    "fig11": [Panel(f"BiSLS-{kind}: the paper's reset options 1, 2, 3", "hyper-representation",
                    [f"bisls-{kind}:response=step,shrink=0.9,grow=2,lower=search,lr={lr},reset={reset},slack=0.0"
                     for reset in ("initial", "keep", "grow")], {"iterations": 20}) for kind, lr in
              (("sgd", 10), ("adam", 1))],
    "fig12": [Panel(f"BiSLS-{kind}, tangent: growth from the last step", "hyper-representation",
                    [f"bisls-{kind}:lower=search,reset=keep",
                     *_over(f"bisls-{kind}:lower=search", "grow", (1.2, 2, 5, 10))], REPRESENTATION)
              for kind in ("sgd", "adam")],
    "fig13": [
        Panel("trials an iteration, by growth", "hyper-representation",
              [f"bisls-{kind}:lower=search,{option}" for kind in ("sgd", "adam")
               for option in ("reset=initial,lr=10", "reset=keep", "grow=1.2", "grow=2", "grow=5", "grow=10")],
              REPRESENTATION, "trials_per_iteration"),
    ],
    "fig14": [Panel(f"BiSLS-{kind}, paper's search, option 1, slack", "hyper-representation",
                    _over(f"bisls-{kind}:{PAPER},lr={lr},reset=initial", "slack", (0.0, 1e-6, 1e-4, 1e-2)),
                    {"iterations": 20}) for kind, lr in (("sgd", 10), ("adam", 1))],
    "fig15": [Panel(f"BiSLS-{kind}, tangent, slack", "hyper-representation",
                    _over(f"bisls-{kind}:lower=search", "slack", (0.0, 1e-6, 1e-4, 1e-2)), REPRESENTATION)
              for kind in ("sgd", "adam")],
    "fig16": [Panel("BiSPS by bound, and BiSLS-SGD", "distillation",
                    [*_over("bisps:", "lr", ("1", "10", "100", "1e3")), "bisps", "bisls-sgd"], DISTILLATION),
              Panel("T = 50", "distillation", ("bisls-sgd", "sgd:lr=20", "adam:lr=0.1"),
                    {"iterations": 50, "lower_steps": 50, "solver_steps": 50})],
    "fig17": [Panel("w8a, one and two samples", "logistic-regression", TWO_SAMPLE, W8A),
              Panel("step size", "logistic-regression", TWO_SAMPLE, W8A, "step_sizes")],
    "fig18": [Panel("hyper-representation, one and two samples", "hyper-representation", _samples(("0.1", "1", "10")),
                    REPRESENTATION)],
    "fig19": [Panel("one and two samples, identity", "distillation", _samples(("1", "10", "100")), IDENTITY),
              Panel("Neumann", "distillation", _samples(("10", "100", "1e3")), DISTILLATION)],
    "bounds-and-decays": [
        Panel(f"BiSPS, decay {decay}", "hyper-representation", _over(f"bisps:decay={decay},lower=search", "lr",
              ("0.1", "1", "10", "100")), REPRESENTATION) for decay in ("constant", "inverse_sqrt", "inverse")
    ] + [Panel("BiSLS-Adam, first lower trial", "hyper-representation", ("bisls-adam", "bisls-sgd"), REPRESENTATION,
               vary=("lower_lr", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)))],
    "reset": [Panel(f"{task}: BiSLS-{kind}, option 3 and always from the last step", task,
                    [f"bisls-{kind}{also}{option}" for option in ("grow=1.2", "grow=2", "reset=keep")], settings,
                    seeds=(0, 1, 2))
              for task, settings, also in (("hyper-representation", {"iterations": 60}, ":lower=search,"),
                                           ("hyper-cleaning", {}, ":lower=search,"))
              for kind in ("sgd", "adam")],
    "carry": [
        Panel(f"hyper-cleaning, BiSLS-{kind}: {'F(x)' if 'resolved' in final else 'f(x, y)'}", "hyper-cleaning",
              [f"bisls-{kind}:lower=search{carry}" for carry in ("", ",carry=True", ",carry=False")],
              vary=("lower_steps", (1, 2, 5)), final=final)
        for kind in ("sgd", "adam") for final in ("last_loss", "last_resolved_loss")
    ] + [
        Panel("hyper-representation, a fresh batch for each lower step", "hyper-representation",
              [f"bisls-{kind}{carry}" for kind in ("sgd", "adam") for carry in ("", ":carry=True", ":carry=False")],
              {"iterations": 100, "fresh_lower_batches": True}, vary=("lower_steps", (1, 3, 10)))
    ],
    "tuning-free": [
        Panel("strong convexity vanishes", "wide-quadratic", TUNING_FREE, {},
              vary=("mu", (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)), seeds=(0,)),
        Panel("noise of the minibatches", "wide-quadratic", TUNING_FREE, {},
              vary=("noise", (0.0, 1e-2, 1e-1, 1.0)), seeds=(0,)),
        Panel("variables of each level", "wide-quadratic", TUNING_FREE, {},
              vary=("size", (100, 1000, 10_000)), seeds=(0,)),
    ],
}  # fmt: skip


def draw(axes: Any, panel: Panel, read: Callable[[Job], Row]) -> list[Row]:
    """Draws a panel and returns its final values."""
    finals = []
    axes.set_title(panel.title, fontsize=9)
    for i, text in enumerate(panel.methods):
        colour = pyplot.colormaps["tab10"](i % 10)
        values = []
        for settings in panel.variants():
            chosen = [read(job) for job in panel.jobs(text, settings)]
            summaries = [row["summary"] for row in chosen]
            final = median(finite(summary[panel.final]) for summary in summaries)
            values.append(final)
            finals.append({
                "panel": panel.title, "method": text, **({} if panel.vary is None else settings), "value": final,
                "trials": median(s["trials_per_iteration"] for s in summaries),
                "failed": max(s["failed"] for s in summaries), "diverged": sum(s["diverged"] for s in summaries),
            })  # fmt: skip
        if panel.vary is not None:
            axes.plot(range(len(values)), values, "o-", color=colour, label=panel.labels()[i], markersize=4)
        else:
            SHOWN.get(panel.shown, _curve)(axes, panel, chosen, i, colour)
    if panel.vary is None and panel.shown == "loss":
        axes.set_ylim(top=min(axes.get_ylim()[1], 3.0 * chosen[0]["evaluations"][0]["loss"]))
    if panel.vary is not None:
        axes.set(
            yscale="log", xticks=range(len(panel.vary[1])), xlabel=panel.vary[0], ylabel=panel.final.replace("_", " ")
        )
        axes.set_xticklabels([f"{value:g}" for value in panel.vary[1]])
    if panel.shown not in ("picture", "trials_per_iteration"):
        axes.legend(fontsize=6)
        axes.grid(alpha=0.25)
    return finals


def _curve(axes: Any, panel: Panel, chosen: Sequence[Row], i: int, colour: Any) -> None:
    label = panel.labels()[i]
    if panel.shown.endswith("step_sizes"):
        row = chosen[0]
        sizes = row[panel.shown]
        every = max(1, row["evaluations"][-1]["iteration"] // max(len(sizes), 1))
        axes.plot([every * k for k in range(len(sizes))], [max(size, 1e-12) for size in sizes], color=colour,
                  linewidth=0.7, alpha=0.8, label=label)  # fmt: skip
    else:
        points = median_curve(chosen, panel.shown)
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
    axes.set(xlabel="(upper) iterations", yscale="linear" if panel.shown == "accuracy" else "log", ylabel=panel.shown)


def _trials(axes: Any, panel: Panel, chosen: Sequence[Row], i: int, colour: Any) -> None:
    trials = median(row["summary"]["trials_per_iteration"] for row in chosen)
    axes.barh([panel.labels()[i]], [trials], color=colour)
    axes.annotate(f"{trials:.1f}", (trials, i), fontsize=7)
    axes.tick_params(axis="y", labelsize=6)


def _path(axes: Any, panel: Panel, chosen: Sequence[Row], i: int, colour: Any) -> None:
    points = [(e["x0"], e["x1"]) for e in chosen[0]["evaluations"]]
    axes.plot(*zip(*points, strict=True), "-", color=colour, linewidth=0.7, label=panel.labels()[i])
    axes.plot(*points[-1], "o", color=colour, markersize=5)
    from tasks import two_quadratics

    axes.plot(*two_quadratics.create(0).minimizer().tolist(), "k*", markersize=10, zorder=5)
    axes.set(xlim=(-4, 4), ylim=(-4, 4))


def _picture(axes: Any, panel: Panel, chosen: Sequence[Row], i: int, colour: Any) -> None:
    flat = torch.tensor(chosen[0]["picture"])
    side = round(flat.shape[1] ** 0.5)
    images = flat.unflatten(1, (side, side))
    scaled = images / images.abs().amax(dim=(1, 2), keepdim=True)
    rows = [torch.cat(list(scaled[k : k + 5]), dim=1) for k in (0, 5)]
    axes.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=-1, vmax=1)
    axes.set_axis_off()


SHOWN: dict[str, Callable[..., None]] = {"trials_per_iteration": _trials, "path": _path, "picture": _picture}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME",
                        help=", ".join(FIGURES))  # fmt: skip
    parser.add_argument("--data", help="folder of the data sets (else the environment's, else a stand-in)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-runs"), help="folder for the runs")
    parser.add_argument("--results", type=Path, help="folder for the figures (else that of the runs)")
    parser.add_argument("--quick", action="store_true", help="four iterations: does it run?")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = data.folder(options.data)
    results = options.results or options.output
    given = None if folder is None else str(folder)
    for name in options.figure:
        panels = [panel.quick() if options.quick else panel for panel in FIGURES[name]]
        where = options.output / ("figures-quick" if options.quick else "figures")
        jobs = [
            job for p in panels for text in p.methods for settings in p.variants() for job in p.jobs(text, settings)
        ]
        rows, _ = run(jobs, where, given)

        def read(job: Job) -> Row:
            return json.loads(job.path(where, given).read_text())

        canvas, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False)
        finals = [final for panel, place in zip(panels, axes[0], strict=True) for final in draw(place, panel, read)]
        canvas.tight_layout()
        results.mkdir(parents=True, exist_ok=True)
        canvas.savefig(results / f"{name}.png", dpi=80)
        pyplot.close(canvas)
        command = f"python examples/benchmarks/figures.py --figure {name} --data DIR --output RUNS"
        write(results / f"{name}.json", {
            "command": command, "data": "real" if folder else "stand-in",
            **{key: rows[0][key] for key in provenance()},
            "curves": finals,
        })  # fmt: skip
        print(f"{name}: " + "; ".join(f"{f['method']} {f['value']:.4g}" for f in finals), flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process; else saturated runs take many times as long
    main()
