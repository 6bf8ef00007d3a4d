"""The algorithms of the literature as compositions, to run and compare on your own problem.

>>> import torch
>>> from adaptive_bilevel import methods, policies
>>> problem = methods.BilevelProblem(
...     upper_loss=lambda x, y, batch: ((y - 1) ** 2 / 2 + x**2 / 20).sum(),
...     lower_loss=lambda x, y, batch: ((y - x / 2) ** 2).sum(),
... )
>>> x, y = torch.tensor([4.0]), torch.tensor([0.0])
>>> for record in methods.run("stocbio", problem, x, y, iterations=3, lower_step=0.4, upper_step=0.5):
...     print(f"{record.losses.upper:.3f}  x = {float(record.x):.3f}")
1.300  x = 3.571
0.946  x = 3.213
0.700  x = 2.914

A row is estimator x lower schedule x step rules x directions x projection (`Row`), and one driver runs them all.
Each row takes every step rule that the mathematics allows, and says why where it does not allow one:

>>> *_, last = methods.run(
...     "ba", problem, x, y, iterations=30, upper_step=policies.SLS(), lower_step=policies.SPSB()
... )
>>> round(float(last.x), 2)
1.43
>>> methods.run("sustain", problem, x, y, iterations=3, upper_step=policies.SLS())  # doctest: +ELLIPSIS
Traceback (most recent call last):
adaptive_bilevel.errors.OptionError: methods.run('sustain'), step of x (upper): Storm's direction is no gradient of ...

`names()` lists the rows, `describe(name)` prints a composition with its cost and assumptions, `compare` runs several.

Which row? T is the number of lower steps, Q that of Hessian-vector products.

| you have | take | it needs | cost of an iteration |
|---|---|---|---|
| no step sizes, nor the wish to find any | `bisls-adam`, `bisls-sgd` | second derivatives | T g + 2 Q HVP + trials |
| the same, and a trial is too dear | `bisps` | lower bounds of both losses | T g + Q HVP |
| the same, full batch, and time | `s-tfbo`, `d-tfbo` | a gradient of size 1 or so | 1 g + 1 HVP; loops until small |
| tuned steps, minibatches, a moderate lower problem | `stocbio`, `amigo` | two (three) step sizes | T g + Q HVP |
| the same, full batch | `aid-bio` | two step sizes | T g + Q HVP, warm-started |
| the cheapest iteration | `soba`, `fsla`, `ttsa` | steps that decay | 1 g + 1 HVP |
| a finite sum, and memory for a table | `saba`; without: `srba` | constant steps | as `soba` (twice for `srba`) |
| noise that dominates | `sustain`, `mrbo`, `vrbo` | decaying steps and weights | two points on each sample |
| a small lower variable | `ba`, `stable` | dense H (d_y products) | T g + d_y HVP |
| a lower loop that is the model | `unroll`, `unroll-truncated` | memory for T iterates | T (g + HVP + JVP) |
| few hyperparameters (d_x), long loops | `unroll-forward` | no memory of iterates | d_x T (HVP + JVP) |
| few hyperparameters, no second derivatives | `pzobo`, `hozog` | patience: the variance grows with d_x | (m + 1) T g |
| many, and no second derivatives | `f2sa`, `pgdo`, `bome`, `darts` | a weight lambda, more step sizes | T g to 3 T g |
| a lower problem with several minimizers | `primal-dual`, `bome` | the same | T g + 3 g |
| a baseline for a proof | `bsa`, `alset` | decaying steps | random Neumann term |
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import OptionError
from ..hypergradient.trees import Tree
from ..optim.projection import Ball, Box, Simplex
from .batches import Loaders, Minibatches, Pair
from .directions import Adam, Momentum, Plain, Saga, Spider, Storm
from .fields import LinearSystem, LowerLoss, PenalisedLoss, SecondLower
from .multipliers import Ascent, Balance, Growth
from .problem import BilevelProblem, BoundModule
from .record import IterationRecord, Losses, Steps
from .row import Row, configure
from .rows import ROWS
from .stream import Run

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
    "compare",
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

    Args:
        name: One of `names()`.

    >>> row("soba").order
    'yvx'
    >>> row("f2sa").multiplier
    Growth(initial=1.0, increment=0.1, exponent=0.14285714285714285, largest=inf)
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

    Args:
        name: One of `names()`.

    >>> _ = describe("soba")  # doctest: +ELLIPSIS
    soba: y, v and x at once, one product of each kind
      source     Dagréou et al., 2022, arXiv 2201.13409
      estimator  Amortised()
      ...
    """
    text = _Description(f"{row(name)}\n  cost       {_measured_cost(row(name))}")
    print(text)
    return text


def _measured_cost(row: Row) -> str:
    """Return what the second iteration costs on a small quadratic."""
    x, y, H = torch.zeros(2), torch.ones(3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    problem = BilevelProblem(
        upper_loss=lambda x, y, _: (y - 1).square().sum() + x.square().sum(),
        lower_loss=lambda x, y, _: 0.5 * (y - x.sum() - 1) @ H @ (y - x.sum() - 1),
    )
    *_, last = Run(row, problem, x - 1, y, iterations=2)
    told = []
    for name, counts in (("f", last.evaluations.upper), ("g", last.evaluations.lower)):
        kinds = {"values": counts.values, "gradients": counts.gradients, "HVPs": counts.hvps, "JVPs": counts.jvps}
        told.append(f"{name}: " + (", ".join(f"{kind} {n}" for kind, n in kinds.items() if n) or "nothing"))
    return "; ".join(told) + ", counted in one iteration where d_x = 2 and d_y = 3"


def run(
    name: str | Row,
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    iterations: int,
    batches: Iterable[object] | None = None,
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
            ``project``; and the arguments of `Run`: ``fresh_batches``, ``v``, ``z``, ``seed``, ``stop``, ``budget``,
            ``progress``, ``max_skips``, ``resume``.

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


def compare(
    entries: Iterable[str] | Mapping[str, str | tuple[str, Mapping[str, Any]]],
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    iterations: int,
    batches: Iterable[object] | None = None,
    **options: Any,
) -> dict[str, list[IterationRecord]]:
    """Run several rows from the same start, and return their records by label.

    Args:
        entries: Names; or labels with a name, or with (name, options of this entry).
        problem: The two losses.
        x: Initial x.
        y: Initial y.
        iterations: Number of upper iterations of each.
        batches: As in `run`; `Minibatches` are copied, so that all rows see the same stream.
        **options: Of all entries; with ``budget=`` all stop at the same oracle cost.

    Raises:
        OptionError: As `run`.

    >>> import torch
    >>> problem = BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> runs = compare(
    ...     {"tuned": ("ba", {"upper_step": 0.5, "lower_step": 0.5}), "searched": "bisls-sgd"},
    ...     problem, torch.tensor([4.0]), torch.tensor([0.0]), iterations=5,
    ... )
    >>> {label: round(float(records[-1].x), 2) for label, records in runs.items()}
    {'tuned': 1.0, 'searched': 1.0}
    """
    labelled = entries if isinstance(entries, Mapping) else {name: name for name in entries}
    results: dict[str, list[IterationRecord]] = {}
    for label, entry in labelled.items():
        name, own = (entry, {}) if isinstance(entry, str) else entry
        stream = copy.deepcopy(batches) if isinstance(batches, Minibatches) else batches
        results[label] = list(run(name, problem, x, y, iterations=iterations, batches=stream, **{**options, **own}))
    return results


_RUN_OPTIONS = {"fresh_batches", "v", "z", "seed", "stop", "budget", "progress", "max_skips", "resume"}
