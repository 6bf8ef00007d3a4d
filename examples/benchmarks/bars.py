"""What the suite's results are held against: a line of text, what was measured, and the most that it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runs import Method
from tables import RESOLVED

if TYPE_CHECKING:
    from report import Table

Row = dict[str, Any]


def of(table: Table) -> list[Row]:
    """The bars of a benchmark."""
    return single_level_bars(table) if table.benchmark.single_level else bilevel_bars(table)


def bilevel_bars(table: Table) -> list[Row]:
    benchmark, seeds, found = table.benchmark, table.benchmark.seeds, []
    ours = table.named(benchmark.ours)
    searching = [m for m in ours if m.name.startswith("bisls")]
    for method in searching:
        rival = method.name.removeprefix("bisls-")
        for figure in table.figures:
            winner = table.best(rival, figure)
            own = table.score(method, seeds, figure)
            least = min(table.score(table.best(label, figure), seeds, figure) for label in table.tried)
            found += [
                loss_bar(method.name, f"the {rival} grid", figure, own / table.score(winner, seeds, figure)),
                loss_bar(method.name, "all grids", figure, own / least),
            ]
        winner = table.best(rival)
        target = table.score(winner, seeds)
        time, its = table.seconds_to(method, target), table.seconds_to(winner, target)
        found.append(_bar(f"{method.name}, no number / best of the {rival} grid: seconds to its final loss",
                          time / its if its else math.inf, 1.0))  # fmt: skip
        spent = sum(run["summary"]["seconds"] for run in table.of(method)) / len(seeds)
        found.append({"bar": f"the {rival} grid / one run of {method.name}: seconds",
                      "measured": table.grid_seconds(rival) / spent})  # fmt: skip
        swept = [m for m in table.named(benchmark.first_trials) if m.name == method.name]
        if swept:
            scores = [table.score(m, seeds) for m in swept]
            found.append(_bar(f"{method.name}, first trials {_ends(swept)}: largest / smallest final loss",
                              max(scores) / min(scores), benchmark.spread))  # fmt: skip
        own_row, *others = table.rows([method, *swept])
        found.append(_bar(f"{method.name} / a constant step at both levels: cost of an iteration",
                          own_row["cost_per_iteration"] / _constant_cost(table), 2.0))  # fmt: skip
        found += step_bars(method.name, {**own_row, "cost_over_loop": table.cost_over_loop(method)}, others)
    return found


def loss_bar(name: str, grids: str, figure: str, measured: float) -> Row:
    """The loss of ours over the best of a grid, or of all."""
    return _bar(f"{name}, no number / best of {grids}: {'F(x)' if figure == RESOLVED else 'f(x, y)'}", measured, 1.0)


def step_bars(name: str, row: Row, swept: Sequence[Row]) -> list[Row]:
    """What the steps of ours did, also from first trials, and the cost of those with no number.

    Args:
        name: Of the method.
        row: Its row with no number, and "cost_over_loop".
        swept: Its rows with first trials.
    """
    rows = [row, *swept]
    return [
        _bar(f"{name}, with and without a first trial: diverged runs", sum(r["diverged"] for r in rows), 0),
        _bar(f"{name}: trials per iteration", max(r["trials_per_iteration"] for r in rows), 1.5),
        _bar(f"{name}: share of failed searches", max(r["failed"] for r in rows), 0.01),
        _bar(f"{name}: share of iterations without a move", 1 - min(r["moved"] for r in rows), 0.05),
        _bar(f"{name} / its lower loop and hypergradient: cost of an iteration", row["cost_over_loop"], 1.15),
    ]


def single_level_bars(table: Table) -> list[Row]:
    benchmark, seeds, found = table.benchmark, table.benchmark.seeds, []
    figure = "last_loss"
    swept = table.named(benchmark.first_trials)
    bounded = [m for m in table.named(benchmark.others) if m.options.get("lr") == 1e3]
    decaying = [m for m in table.tried["sgd decay=inverse_sqrt"] if m.options["lr"] == 1e3 and table.of(m)]
    rivals = [table.score(m, [s for s in seeds if s in table._runs[str(m)]], figure) for m in [*bounded, *decaying]]
    for method in table.named(benchmark.ours):
        own = {m.options["lr"]: table.score(m, seeds, figure) for m in swept if m.name == method.name}
        text = f"{method.name}, no number / best bound of {min(own):g} ... {max(own):g}: last loss"
        found.append(_bar(text, table.score(method, seeds, figure) / min(own.values()), 1.25))
        if 1e3 in own and rivals and benchmark.task == "logistic-regression":
            text = f"{method.name} / best of decaying SGD, SPS_max, DecSPS, SLS, all at bound 1000: last loss"
            found.append(_bar(text, own[1e3] / min(rivals), 0.2))
    return found


def _constant_cost(table: Table) -> float:
    """Cost of an iteration of SGD at both levels, from any run of the grids with a constant lower step."""
    for methods in table.tried.values():
        for method in methods:
            if not isinstance(method.options.get("lower"), str) and table.of(method):
                return float(table.of(method)[0]["summary"]["cost_per_iteration"])
    return math.nan


def _bar(text: str, measured: float, at_most: float) -> Row:
    return {"bar": text, "measured": measured, "at most": at_most, "holds": measured <= at_most}


def _ends(methods: Sequence[Method]) -> str:
    lrs = [method.options["lr"] for method in methods]
    return f"{min(lrs):g} ... {max(lrs):g}"
