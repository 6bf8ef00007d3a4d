"""`plot`: losses, step sizes and outcomes of a run at both levels, from the rows of `monitor`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

from ..errors import DependencyError, OptionError
from ..policies import Outcome
from .monitoring import Row

__all__ = ["plot"]

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink")


def plot(rows: Sequence[Row], file: str | PathLike[str] | None = None, *, title: str = "") -> Any:
    """Draw a run: for each level its loss, its step sizes, and how its steps ended.

    Args:
        rows: What `monitor` returned after each step, in order.
        file: Where the picture is saved, in the format of its suffix; None: it is not.
        title: A line above it.

    Returns:
        A ``matplotlib.figure.Figure``; notebooks show it.

    Raises:
        DependencyError: matplotlib is not installed (also an ImportError).
        OptionError: There are no rows, or they are none of `monitor`.

    >>> import torch
    >>> from adaptive_bilevel import SLS, monitor
    >>> x, rows = torch.tensor([1.0], requires_grad=True), []
    >>> optimizer = SLS([x])
    >>> for _ in range(5):
    ...     _ = optimizer.step(lambda: (x**2).sum())
    ...     rows.append(monitor(optimizer))
    >>> len(plot(rows, title="a run").axes)
    3
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("plot needs matplotlib, which is not installed: pip install matplotlib") from error
    rows = list(rows)
    levels = [level for level in ("upper", "lower") if any(_parts(rows, level))]
    if not levels:
        raise OptionError(
            "plot(rows=...): there is no row with a level; collect rows.append(monitor(outer)) after each step"
        )
    figure = Figure(figsize=(5.2 * len(levels), 6.6), layout="constrained")
    axes = figure.subplots(3, len(levels), squeeze=False, sharex=True, height_ratios=(3, 2, 2))
    for column, level in enumerate(levels):
        names = _parts(rows, level)
        _lines(axes[0][column], rows, names, "loss")
        _lines(axes[1][column], rows, names, "step_size")
        _outcomes(axes[2][column], rows, names)
        axes[0][column].set_title(f"{level} level")
        axes[0][column].set_ylabel("loss before the step")
        axes[1][column].set_ylabel("step size")
        axes[2][column].set_xlabel("upper step" if "upper" in levels else "step")
    if title:
        figure.suptitle(title)
    if file is not None:
        figure.savefig(file, dpi=120)
    return figure


def _parts(rows: Sequence[Row], level: str) -> list[str]:
    """Return the prefixes of a level's optimizers."""
    ending = "/step_size"
    found = {name.removesuffix(ending): None for row in rows for name in row if name.endswith(ending)}
    return [name for name in found if name == level or name.startswith(f"{level}/")]


def _lines(axis: Any, rows: Sequence[Row], names: Sequence[str], what: str) -> None:
    """Draw a quantity of each optimizer of a level, on a logarithmic scale if all of it is positive."""
    positive, drawn = True, False
    for index, name in enumerate(names):
        values = [float(row.get(f"{name}/{what}", math.nan)) for row in rows]
        if what == "step_size":
            values = [value if value > 0.0 else math.nan for value in values]  # nothing moved: the outcome says why
        known = [value for value in values if math.isfinite(value)]
        positive, drawn = positive and all(value > 0.0 for value in known), drawn or bool(known)
        axis.plot(values, ".-", color=_COLORS[index % len(_COLORS)], linewidth=1, markersize=3, label=name)
    if positive and drawn:
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize="small")
    if not drawn:
        _nothing(axis)
    axis.grid(alpha=0.3)


def _outcomes(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Draw how the steps ended: a line of points for each outcome, the frequent one at the top."""
    ended = [[_word(row.get(f"{name}/outcome")) for row in rows] for name in names]
    words = [word for each in ended for word in each if word is not None]
    if not words:
        _nothing(axis)
        return
    listed = sorted(set(words), key=words.count)
    for index, each in enumerate(ended):
        points = [(k, listed.index(word)) for k, word in enumerate(each) if word is not None]
        color = _COLORS[index % len(_COLORS)]
        axis.plot([k for k, _ in points], [y for _, y in points], "|", color=color, markersize=9)
    counts = [f"{word.replace('_', ' ')} ({words.count(word)})" for word in listed]
    axis.set_yticks(range(len(listed)), counts, fontsize="small")
    axis.set_ylim(-0.5, len(listed) - 0.5)
    axis.grid(alpha=0.3, axis="x")


def _word(outcome: Any) -> str | None:
    if outcome is None or isinstance(outcome, str):
        return outcome
    return Outcome(int(outcome)).name if int(outcome) >= 0 else None


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", alpha=0.5)
