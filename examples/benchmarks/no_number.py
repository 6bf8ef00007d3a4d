"""SPSB and SLSB with no number given, against a grid of bounds: logistic regression on four sets.

    python examples/benchmarks/no_number.py --data DIR --output RUNS [--only NAME ...]

Batches of 100 for 10 epochs, the suboptimality of the last iterate, medians over three seeds. "ratio" is what is
reached with no number given over what the best bound of the grid reaches; who tries the grid pays six runs for it.
mushrooms is separable, so its solution is at infinity: the larger the bound, the better, and no rule finds that. The
runs are kept in RUNS (see evidence.py), the tables and the picture in ``results/no_number.json`` and ``.png``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from evidence import BOUNDED, RESULTS, Sweep, finite, options_of, pyplot, versions, write

BOUNDS = (1, 10, 100, 1000, 10_000, 100_000)
SETS = {"w8a": (100, 1000, 10_000), "a9a": BOUNDS, "mushrooms": BOUNDS, "phishing": BOUNDS}  # w8a: the best and beside
COLOURS = {"spsb": "tab:blue", "slsb": "tab:orange"}


def sweeps(name: str) -> list[Sweep]:
    """For each rule: nothing given, then the grid."""
    return [Sweep(name, [rule, *(f"{rule}:lr={bound}" for bound in SETS[name])]) for rule in BOUNDED]


def row(name: str, rule: str, table: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A rule on a set; `table` has the runs with nothing given first."""
    values = [[finite(r["summary"]["last_loss"]) for r in runs] for runs in table]
    (chosen, *grid) = map(median, values)
    best = min(grid)
    return {
        "set": name,
        "rule": rule,
        "ratio": chosen / best,
        "best bound": SETS[name][grid.index(best)],
        "nothing given": {"last_loss": values[0], "median": chosen},
        "grid": {str(bound): value for bound, value in zip(SETS[name], grid, strict=True)},
        "bounds worse than nothing given": sum(value > chosen for value in grid),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["set"] for r in rows))
    canvas, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), squeeze=False)
    for r in rows:
        panel, colour = axes[0, names.index(r["set"])], COLOURS[r["rule"]]
        grid = list(r["grid"].values())
        panel.plot(SETS[r["set"]], grid, "o-", color=colour, markersize=4, label=f"{r['rule']}, bound given")
        panel.axhline(r["nothing given"]["median"], color=colour, linestyle="--", label=f"{r['rule']}, nothing given")
        panel.set(xscale="log", yscale="log", xlabel="bound", title=r["set"], xticks=BOUNDS, xlim=(0.6, 1.6e5))
        panel.grid(alpha=0.25)
    axes[0, 0].set_ylabel("suboptimality of the last iterate")
    axes[0, 0].legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(RESULTS / "no_number.png", dpi=90)
    pyplot.close(canvas)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    options = options_of(__doc__, list(SETS), arguments)
    rows = []
    for name in options.only:
        for rule, sweep in zip(BOUNDED, sweeps(name), strict=True):
            sweep.run(str(options.data), options.output)
            rows.append(row(name, rule, sweep.read(options.output)))
    ratios = [r["ratio"] for r in rows]
    write(RESULTS / "no_number.json", {
        "title": "Logistic regression, batch 100, 10 epochs: suboptimality of the last iterate with no number given",
        "command": "python examples/benchmarks/no_number.py --data DIR --output RUNS",
        **versions(),
        "ratios to the best bound": {
            "geometric mean": math.exp(sum(map(math.log, ratios)) / len(ratios)), "worst": max(ratios),
        },
        "rows": rows,
    })  # fmt: skip
    draw(rows)
    for r in rows:
        print(f"{r['set']:<10} {r['rule']}  {r['ratio']:.2f}x the best bound, which is {r['best bound']:g}")


if __name__ == "__main__":
    main()
