"""Ours anew, in results whose grids and peers stay as they were run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import bars
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
    measured = {bar["bar"]: bar for row in rows for bar in _bars(row, others)}
    kept = [measured.get(bar["bar"], bar) for bar in content["bars"]]
    return {**content, "rows": [*({**row, **source} for row in rows), *others], "bars": kept}


def _bars(row: Row, others: Sequence[Row]) -> list[Row]:
    """Return the bars of a row of ours that need no other run."""
    name = row["method"].split()[0]
    rival = name.removeprefix("bisls-")
    grids = [other for other in others if other["kind"] == "grid"]
    own = [grid for grid in grids if _is_plain(grid["method"], rival)]
    swept = [other for other in others if other["kind"] == "first trial" and other["method"].split()[0] == name]
    found = bars.step_bars(name, row, swept)
    for figure in ("loss", RESOLVED):
        for which, rivals in ((f"the {rival} grid", own), ("all grids", grids)):
            known = [_value(grid, figure) for grid in rivals if figure in grid]
            if known and figure in row:
                found.append(bars.loss_bar(name, which, figure, _value(row, figure) / min(known)))
    return found


def _is_plain(method: str, rival: str) -> bool:
    """Return whether a grid point is one of this optimizer with the hypergradient of ours and a constant rate."""
    name, *options = method.split()
    return name == rival and not any(option.startswith(("solver=", "decay=")) for option in options)


def _value(row: Row, figure: str) -> float:
    return median(map(number, row[figure]))
