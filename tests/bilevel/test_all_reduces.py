"""Number and size of all-reduces in an upper iteration: those of the table in docs/processes.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed

from adaptive_bilevel import SLS, SPSB, BiSLS, BiSPS
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit
from tests.bilevel.test_fully_sharded import Problem as Sharded
from tests.bilevel.test_processes import Problem
from tests.processes import results_of

PAGE = Path(__file__).parents[2] / "docs" / "processes.md"
ROWS = {
    "two lower steps, `SLS` below `BiSLS`": ("BiSLS", "lower"),
    "two lower steps, `SPSB` below `BiSPS`": ("BiSPS", "lower"),
    "`implicit` with `Lanczos(10)`": ("BiSLS", "implicit"),
    "`BiSLS.step`": ("BiSLS", "upper"),
    "`BiSPS.step`": ("BiSPS", "upper"),
}
"""The table's rows, with the class and the part of the iteration."""
SIZES = ("x and y", "y", "x", "numbers")
"""Its columns."""
IN_PARTS = {
    "two lower steps, `SLS` below `BiSLS`, y in parts": ("lower", "lower"),
    "`implicit` with `Lanczos(10)`, y in parts": ("lower", "implicit"),
    "`BiSLS.step`, y in parts": ("lower", "upper"),
    "`implicit` with `Lanczos(10)`, both in parts": ("both", "implicit"),
    "`BiSLS.step`, both in parts": ("both", "upper"),
}
"""The rows of the second table, with what is sharded and the part of the iteration; columns: x, numbers."""


def work(rank: int) -> dict[tuple[str, str], list[float]]:
    counts: dict[tuple[str, str], Counter[str]] = {row: Counter() for row in ROWS.values()}
    counts["BiSPS", "implicit"] = Counter()
    now: Counter[str] = Counter()
    original = distributed.all_reduce

    def counted(block: Tensor, *args: Any, **kwargs: Any) -> Any:
        entries = {"x and y": wide_x + wide_y, "y": wide_y, "x": wide_x, "numbers": 0}
        flags = {name: block.numel() - size for name, size in entries.items()}
        now[next(name for name, more in flags.items() if 0 <= more <= 12)] += 1  # flags travel along
        return original(block, *args, **kwargs)

    for name in ("BiSLS", "BiSPS"):
        p = Problem([rank], "plain")
        wide_x, wide_y = (sum(t.numel() for t in tensors) for tensors in (p.x, p.y))
        inner: Any = SLS(p.y) if name == "BiSLS" else SPSB(p.y)
        outer: Any = BiSLS(p.x, lower=inner) if name == "BiSLS" else BiSPS(p.x, lower=inner)
        distributed.all_reduce = counted  # type: ignore[assignment]
        for k in range(10):
            upper, lower = partial(p.upper, k), partial(p.lower, 2 * k + 1)
            scratch: Counter[str] = Counter()
            now = counts[name, "lower"] if k >= 5 else scratch
            for j in range(2):
                inner.step(partial(p.lower, 2 * k + j))
            now = counts[name, "implicit"] if k >= 5 else scratch
            assign(p.x, implicit(upper, lower, p.x, p.y, Lanczos(10)))
            now = counts[name, "upper"] if k >= 5 else scratch
            outer.step(upper)
        distributed.all_reduce = original
    return {row: [counts[row][size] / 5.0 for size in SIZES] for row in ROWS.values()}


def estimated(p: Sharded, upper: Callable[[], Tensor], lower: Callable[[], Tensor]) -> None:
    assign(p.x, implicit(upper, lower, p.x, p.y, Lanczos(10)))


def work_in_parts(rank: int) -> dict[tuple[str, str], list[float]]:
    """What the package exchanges itself: the modules gather parameters and reduce gradients beside it."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    now: Counter[str] = Counter()
    original = distributed.all_reduce

    def counted(block: Tensor, *args: Any, **kwargs: Any) -> Any:
        now["x" if what == "lower" and block.numel() in (wide_x + 1, wide_x + 3) else "numbers"] += 1
        return original(block, *args, **kwargs)

    for what in ("lower", "both"):
        p = Sharded([rank], what)
        wide_x = sum(t.numel() for t in p.x)
        inner = SLS(p.y)
        outer = BiSLS(p.x, lower=inner)
        distributed.all_reduce = counted  # type: ignore[assignment]
        for k in range(10):
            upper, lower = partial(p.upper, k), partial(p.lower, 2 * k + 1)
            iteration: list[tuple[str, Callable[[], Any]]] = [
                *(("lower", partial(inner.step, partial(p.lower, 2 * k + j))) for j in range(2)),
                ("implicit", partial(estimated, p, upper, lower)),
                ("upper", partial(outer.step, upper)),
            ]
            for name, run in iteration:
                now = counts.setdefault((what, name), Counter()) if k >= 5 else Counter()
                run()
        distributed.all_reduce = original
    return {row: [counts[row][size] / 5.0 for size in ("x", "numbers")] for row in IN_PARTS.values()}


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(("measure", "rows"), [(work, ROWS), (work_in_parts, IN_PARTS)], ids=["whole", "in parts"])
def test_the_tables_of_all_reduces(measure: Callable[[int], Any], rows: dict[str, tuple[str, str]]) -> None:
    one, two = results_of(measure)
    assert one == two
    lines = {line.split("|")[1].strip(): line.split("|")[2:] for line in PAGE.read_text().splitlines() if "|" in line}
    for name, row in rows.items():
        told = [float(re.findall(r"[\d.]+", cell)[0]) for cell in lines[name][: len(one[row])]]
        assert one[row] == pytest.approx(told, abs=0.051), name
