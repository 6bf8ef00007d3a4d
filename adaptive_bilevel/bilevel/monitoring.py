"""`monitor`: the last step of an optimizer, and of the levels below it, as one dict of scalars for any logger."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from ..errors import OptionError
from ..hypergradient.solution import HessianReport, SolverStatus
from ..optim.base import AdaptiveOptimizer
from ..optim.conclusion import Past
from ..optim.unwrap import unwrapped
from ..policies import Outcome
from .lower import LowerLevel
from .upper import UpperOptimizer

__all__ = ["Row", "monitor"]

Row: TypeAlias = dict[str, float | int | str]
"""What `monitor` returns for one step."""

_NONE = "none"
"""The word where there was no step, or no solve."""


def monitor(optimizer: Any, *, words: bool = True) -> Row:
    """Return the last step as a dict of scalars: a row of a table, or what a logger takes.

    Of each level, with the names beginning with "upper/" or "lower/" ("lower/0/", "lower/1/", ... if there are several
    lower optimizers):

    | name | what it is |
    |---|---|
    | loss | the loss before the step |
    | step_size | the step taken; 0 if nothing moved. Of a stock lower optimizer its lr, and nothing else is known |
    | slope, slope_ratio | <h, d> of what was searched, and its ratio to what the hypergradient promised |
    | trials | trial evaluations of the step |
    | outcome | a word, see `adaptive_bilevel.policies.Outcome` |
    | solver | how the response's solve ended, a word, see `adaptive_bilevel.hypergradient.SolverStatus` |
    | solver_residual | its relative residual |
    | values, gradients, hvps, jvps | oracle calls of this level's loss so far, by this level's optimizer |

    And "response/hvps", ...: the calls of the lower loss that the upper steps made.

    Names are the same at each step, so that rows make a table; a number that is not known is NaN. On an accelerator,
    this waits for the device.

    Args:
        optimizer: An optimizer of this package, or an object whose ``optimizer`` is one.
        words: Whether outcome and solver status are words. False: their numbers (-1: none), for loggers of numbers.

    Raises:
        OptionError: It is something else, or has taken no step.

    >>> import torch
    >>> from adaptive_bilevel import SLS, monitor
    >>> x = torch.ones(2, requires_grad=True)
    >>> optimizer = SLS([x])
    >>> _ = optimizer.step(lambda: (x**2).sum())
    >>> row = monitor(optimizer)
    >>> row["lower/loss"], row["lower/trials"], row["lower/outcome"], row["lower/gradients"]
    (2.0, 3, 'accepted', 1)
    """
    held = unwrapped(optimizer)
    if not isinstance(held, AdaptiveOptimizer):
        raise OptionError(
            f"monitor({type(optimizer).__name__}): pass an optimizer of adaptive_bilevel, e.g. monitor(outer)"
        )
    if not held.history:
        raise OptionError(f"monitor: {type(held).__name__} has taken no step yet: call step(closure) first")
    if not isinstance(held, UpperOptimizer):
        return _level("lower/", held, words)
    row = _level("upper/", held, words)
    lower = held.lower.optimizers if isinstance(held.lower, LowerLevel) else []
    for index, each in enumerate(lower):
        name = "lower/" if len(lower) == 1 else f"lower/{index}/"
        if isinstance(each, AdaptiveOptimizer):
            row |= _level(name, each, words)
        else:
            row[f"{name}step_size"] = float(each.param_groups[0]["lr"])
    row |= {f"response/{name}": count for name, count in vars(held.evaluations.lower).items()}
    return row


def _level(name: str, optimizer: AdaptiveOptimizer, words: bool) -> Row:
    """Return the scalars of one optimizer."""
    past, upper = optimizer.history[-1] if optimizer.history else None, isinstance(optimizer, UpperOptimizer)
    found = _step(past, words)
    if upper:
        found |= _solve(None if past is None else past.hessian, words)
    counts = optimizer.evaluations.upper if upper else optimizer.evaluations.lower
    return {f"{name}{key}": value for key, value in (found | vars(counts)).items()}


def _step(past: Past | None, words: bool) -> Row:
    if past is None:
        none: Row = dict.fromkeys(("loss", "step_size", "slope", "slope_ratio"), math.nan)
        return none | {"trials": 0, "outcome": _NONE if words else -1}
    record = past.record
    outcome = Outcome(int(record.outcome))
    return {
        "loss": float(past.loss),
        "step_size": float(record.step_size),
        "slope": float(record.slope),
        "slope_ratio": float(record.slope_ratio),
        "trials": int(record.trials),
        "outcome": outcome.name if words else int(outcome),
    }


def _solve(report: Any, words: bool) -> Row:
    if not isinstance(report, HessianReport):
        return {"solver": _NONE if words else -1, "solver_residual": math.nan}
    status = SolverStatus(int(report.status))
    return {"solver": status.name if words else int(status), "solver_residual": float(report.residual)}
