"""The algorithms of the literature as compositions, on your own problem, in one call."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..hypergradient._tensors import Tree
from ..optim.projection import Ball, Box, Simplex
from .batches import Loaders, Minibatches, Pair
from .directions import Adam, Momentum, Plain, Saga, Spider, Storm
from .driver import Run
from .fields import LinearSystem, LowerLoss, PenalisedLoss, SecondLower
from .multipliers import Ascent, Balance, Growth
from .problem import BilevelProblem, BoundModule
from .record import IterationRecord, Losses, Steps
from .row import Row, configure
from .rows import ROWS

__all__ = [
    "Adam",
    "Ascent",
    "Balance",
    "Ball",
    "BilevelProblem",
    "BoundModule",
    "Box",
    "Growth",
    "IterationRecord",
    "LinearSystem",
    "Loaders",
    "Losses",
    "LowerLoss",
    "Minibatches",
    "Momentum",
    "Pair",
    "PenalisedLoss",
    "Plain",
    "Row",
    "Run",
    "Saga",
    "SecondLower",
    "Simplex",
    "Spider",
    "Steps",
    "Storm",
    "describe",
    "names",
    "row",
    "run",
]


class _Names(tuple[str, ...]):
    """Names of rows; as a string, a line on each."""

    def __repr__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {ROWS[name].summary} ({ROWS[name].source})" for name in self)

    __str__ = __repr__


class _Description(str):
    """A text that says its name only where it would be echoed a second time."""

    def __repr__(self) -> str:
        return f"<{self.partition(':')[0]}>"


def names() -> tuple[str, ...]:
    """Return the names of all rows; printed, they have a line each, with the reference.

    >>> "stocbio" in names()
    True
    """
    return _Names(ROWS)


def row(name: str) -> Row:
    """Return a row by its name.

    Raises:
        OptionError: There is none of that name.
    """
    if name not in ROWS:
        near = difflib.get_close_matches(str(name).lower().replace("_", "-"), ROWS, n=3, cutoff=0.3)
        raise OptionError(
            f"methods.run({name!r}): there is no such row; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + "methods.names() lists all"
        )
    return ROWS[name]


def describe(name: str) -> str:
    """Print a row's composition, its cost per iteration and its assumptions, and return the text.

    Raises:
        OptionError: There is no row of that name.
    """
    text = _Description(row(name))
    print(text)
    return text


def run(
    name: str | Row,
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    iterations: int,
    batches: Any = None,
    **options: Any,
) -> Run:
    """Run a row on a problem: an iterator of one `IterationRecord` per iteration.

    Args:
        name: A name of `names()`, or a `Row` of your own.
        problem: The two losses.
        x: Initial x: a tensor, a nesting of tensors, or a module. It is copied, and nothing of it is changed.
        y: Initial y, likewise.
        iterations: Number of upper iterations.
        batches: None for full batch, `Minibatches`, `Loaders`, or any iterable of (upper batch, lower batch); one pair
            is drawn per iteration.
        **options: Fields of `Row`, such as ``upper_step``, ``lower_step``, ``lower_steps``, ``solver``, ``estimator``,
            ``project``; and the arguments of `Run`: ``fresh_batches``, ``v``, ``z``, ``seed``, ``stop``, ``progress``,
            ``max_skips``, ``resume``.

    Raises:
        OptionError: An option is unknown or out of range, or the mathematics does not allow the combination.
        TensorError: A variable holds no tensor that can be stepped.

    >>> import torch
    >>> problem = BilevelProblem(
    ...     upper_loss=lambda x, y, batch: ((y - 1) ** 2 / 2 + x**2 / 20).sum(),
    ...     lower_loss=lambda x, y, batch: ((y - x / 2) ** 2).sum(),
    ... )
    >>> start = torch.tensor([4.0]), torch.tensor([0.0])
    >>> *_, last = run("bisls-sgd", problem, *start, iterations=10)
    >>> last.x  # 10 / 7
    tensor([1.4286])
    """
    chosen = name if isinstance(name, Row) else row(name)
    of_run: Mapping[str, Any] = {key: options.pop(key) for key in _RUN_OPTIONS & options.keys()}
    return Run(configure(chosen, options), problem, x, y, iterations=iterations, batches=batches, **of_run)


_RUN_OPTIONS = {"fresh_batches", "v", "z", "seed", "stop", "progress", "max_skips", "resume"}
