"""Grids of step sizes for both levels: decades first, then half a decade around the winner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runs import Method

HALF = 10**0.5


@dataclass(frozen=True)
class Grid:
    """A method with every combination of the upper steps `lrs` and the lower choices `lowers` (see methods.py).

    Without `lowers` there is one level, or the lower level has the task's own rule. `then` are lower choices that are
    tried with the best upper step alone.
    """

    name: str
    lrs: Sequence[float]
    lowers: Sequence[float | str] = ()
    then: Sequence[float | str] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return str(Method(self.name, self.options))

    def method(self, lr: float, lower: float | str | None = None) -> Method:
        chosen = {"lr": _rounded(lr)} | ({} if lower is None else {"lower": _rounded(lower)})
        return Method(self.name, chosen | self.options)

    def coarse(self) -> list[Method]:
        lowers: Sequence[float | str | None] = self.lowers or (None,)
        return [self.method(lr, lower) for lr, lower in itertools.product(self.lrs, lowers)]

    def finer(self, winner: Method) -> list[Method]:
        """The neighbours of the winner at half a decade, and where it lies at an end of the grid, a decade beyond."""
        lowers: Sequence[float | str | None] = [winner.options.get("lower")]
        if self.lowers and not isinstance(lowers[0], str):
            lowers = _around(winner.options["lower"], [lower for lower in self.lowers if not isinstance(lower, str)])
        lrs = _around(winner.options["lr"], self.lrs)
        methods = [self.method(lr, lower) for lr, lower in itertools.product(lrs, lowers)]
        methods += [self.method(winner.options["lr"], lower) for lower in self.then]
        return [method for method in methods if method != winner]

    def smaller(self) -> Grid:
        """Two steps of each level: for a quick run."""
        return replace(self, lrs=self.lrs[1:3], lowers=self.lowers[:2], then=self.then[:1])


def best(methods: Sequence[Method], score: Callable[[Method], float], count: int = 1) -> list[Method]:
    """The `count` methods with the least score."""
    return sorted(methods, key=score)[:count]


def _around(value: float, ends: Sequence[float]) -> list[float]:
    found = [value, value / HALF, value * HALF]
    if value <= _rounded(min(ends)):
        found.append(value / 10)
    if value >= _rounded(max(ends)):
        found.append(value * 10)
    return found


def _rounded(value: float | str) -> Any:
    return value if isinstance(value, str) else float(f"{value:.3g}")
