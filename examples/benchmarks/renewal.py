"""Ours anew, in results whose grids and peers stay as they were run: constant steps do not depend on this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from tables import RESOLVED, number

Row = dict[str, Any]


def renewed(content: Row, rows: Sequence[Row], source: Row) -> Row:
    """Return the content of a result file with these rows of ours in the place of those there.

    What is said of them is computed anew, but for what needs runs of both in one process: bars of seconds, and those of
    first trials. The picture beside the file stays, too.

    Args:
        content: Of the file.
        rows: Ours, as `report.Table.renewable` makes them.
        source: What the rows depend on, such as the commit of the core; each row gets it.
    """
    replaced = {row["label"] for row in rows}
    others = [row for row in content["rows"] if row["kind"] != "ours" or row["label"] not in replaced]
    measured: dict[str, float] = {}
    for row in rows:
        measured |= _measured(row, others)
    bars = [_renewed_bar(bar, measured) for bar in content["bars"]]
    return {**content, "rows": [*({**row, **source} for row in rows), *others], "bars": bars}


def _measured(row: Row, others: Sequence[Row]) -> dict[str, float]:
    """Return the bars of a row of ours by their texts."""
    name = row["method"].split()[0]
    rival = name.removeprefix("bisls-")
    grids = [other for other in others if other["kind"] == "grid"]
    own = [grid for grid in grids if _is_plain(grid["method"], rival)]
    swept = [other for other in others if other["kind"] == "first trial" and other["method"].split()[0] == name]
    found = {
        f"{name}, with and without a first trial: diverged runs": float(sum(r["diverged"] for r in (row, *swept))),
        f"{name}: trials per iteration": max(r["trials_per_iteration"] for r in (row, *swept)),
        f"{name}: share of failed searches": max(r["failed"] for r in (row, *swept)),
        f"{name}: share of iterations without a move": 1 - min(r["moved"] for r in (row, *swept)),
        f"{name} / its lower loop and hypergradient: cost of an iteration": row["cost_over_loop"],
    }
    for figure, key in (("f(x, y)", "loss"), ("F(x)", RESOLVED)):
        for which, rivals in ((f"the {rival} grid", own), ("all grids", grids)):
            known = [_value(grid, key) for grid in rivals if key in grid]
            if known and key in row:
                found[f"{name}, no number / best of {which}: {figure}"] = _value(row, key) / min(known)
    return found


def _is_plain(method: str, rival: str) -> bool:
    """Return whether a grid point is one of this optimizer with the hypergradient of ours and a constant rate."""
    name, *options = method.split()
    return name == rival and not any(option.startswith(("solver=", "decay=")) for option in options)


def _value(row: Row, key: str) -> float:
    return median(map(number, row[key]))


def _renewed_bar(bar: Row, measured: dict[str, float]) -> Row:
    if bar["bar"] not in measured:
        return bar
    value = measured[bar["bar"]]
    held = {"holds": math.isfinite(value) and value <= bar["at most"]} if "at most" in bar else {}
    return {**bar, "measured": value, **held}
