"""What a parameter group may hold: the options of the optimizer, a rate of its own, and what is written for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import OptionError
from ..policies import validation

__all__ = ["refuse_lr", "refuse_options"]

_FOR_OTHERS = frozenset(
    (
        *("params", "param_names", "name", "scale", "automatic", "step_size", "unscheduled_lr"),
        *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),
    )
)
"""Entries that are no options: of torch, of this package, and of torch's schedulers and averaging."""

_OFF_ELSEWHERE = frozenset(
    (
        *("momentum", "weight_decay", "dampening", "nesterov", "amsgrad", "maximize", "foreach", "fused", "capturable"),
        *("differentiable", "decoupled_weight_decay", "lr_decay", "initial_accumulator_value", "centered"),
    )
)
"""Options of torch's optimizers that a group may hold for the sake of those, as long as they are off."""

_REMEDIES = {
    "weight_decay": "add the penalty to the loss, where the search sees it",
    "momentum": "leave it out",
    "maximize": "return the negative of what is to be maximized, and give lower_bound= for it",
}


def refuse_options(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Reject a group whose options are not those of the optimizer, or are none.

    Args:
        owner: Name of the optimizer's class.
        group: The group.
        defaults: The optimizer's options.

    Raises:
        OptionError: There is such an option.
    """
    for name, value in group.items():
        if name == "lr" or name in _FOR_OTHERS:
            continue
        if name in defaults:
            if value != defaults[name]:
                raise OptionError(
                    f"{owner}: a parameter group has {name}={value!r} where the optimizer has {defaults[name]!r}; "
                    "one rule steps all groups, so they may only differ in lr"
                )
        elif value or name not in _OFF_ELSEWHERE:
            raise OptionError(
                f"{owner}: a parameter group has {name}={value!r}, which no rule here has; "
                f"{_REMEDIES.get(name, 'leave it out')}"
            )


def refuse_lr(owner: str, lr: Any, check: Callable[[Any], None]) -> None:
    """Reject a rate that the constructor rejects. 0 is allowed: such a group does not move.

    Args:
        owner: Name of the optimizer's class.
        lr: The rate.
        check: The constructor's own check.

    Raises:
        OptionError: It is out of range.
    """
    try:
        number = validation.plain(lr)
        if isinstance(number, bool) or number is None or number != 0.0:
            check(math.nan if number is None else number)
    except OptionError:
        raise OptionError(
            f"{owner}: a parameter group has lr={lr!r}; lr must be a number at or above 0 that the constructor takes: "
            "look at the group, at the scheduler, or at whatever else wrote it"
        ) from None
