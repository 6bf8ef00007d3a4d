"""Which optimizer of the core steps a level: named by its class, or by a policy."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, BiSPS, DecSPS, SPSMax, policies
from adaptive_bilevel.bilevel.upper import UpperOptimizer
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from .direction import as_direction, as_stepped

__all__ = ["resolve"]

_LOWER: dict[type[Any], type[AdaptiveOptimizer]] = {
    policies.SPSMax: SPSMax,
    policies.DecSPS: DecSPS,
    policies.SPSB: SPSB,
    policies.SLS: SLS,
    policies.SLSB: SLSB,
}
_UPPER: dict[type[Any], type[AdaptiveOptimizer]] = {policies.SLS: BiSLS, policies.Envelope: BiSPS}
_NO_BOUND = -1e300  # Polyak's ratio then is above any bound, so the step is the bound


def resolve(
    owner: str, rule: Any, lr: float | None, options: dict[str, Any], *, upper: bool
) -> tuple[type[AdaptiveOptimizer], float | None, dict[str, Any]]:
    """Return the optimizer's class, its lr and its options.

    Args:
        owner: Who asks, for errors.
        rule: A class of the core, or a policy with options of its own, e.g. ``policies.Constant(bound=0.1)``.
        lr: The bound or first trial; a policy brings its own.
        options: Options that were given by keyword, direction among them.
        upper: Whether the level is the upper one.

    Raises:
        OptionError: The rule is none of this level, or both it and `lr` name a number.
    """
    direction = options["direction"]
    options = {**options, "direction": as_direction(direction)}
    if isinstance(rule, type) and issubclass(rule, AdaptiveOptimizer) and issubclass(rule, UpperOptimizer) == upper:
        return rule, lr, options
    if isinstance(rule, policies.Constant):
        _once(owner, rule, lr)
        if upper:
            fixed: dict[str, Any] = {"lr_min": rule.bound, "decay": rule.decay}
        else:
            fixed = {"floor": rule.bound, "decay": rule.decay, "floor_decay": rule.decay}
        adam = {name: options[name] for name in ("betas", "eps") if name in options}
        if options["direction"] == "adam":  # TorchOpt's: they are its constants, and none of the rule's
            options = {name: value for name, value in options.items() if name not in adam}
        fixed.update(lower_bound=_NO_BOUND)
        return (
            (BiSPS if upper else SPSMax),
            rule.bound,
            {**fixed, **options, "direction": as_stepped(direction, **adam)},
        )
    known = (_UPPER if upper else _LOWER).get(type(rule))
    if known is None:
        names = "BiSLS or BiSPS" if upper else "SPSMax, DecSPS, SPSB, SLS or SLSB"
        example = "UpperStep([x], lower=inner.lower, rule=BiSLS)" if upper else "LowerStep(self, SLS)"
        raise OptionError(
            f"{owner}(rule={rule!r}): rule must be one of the classes {names} of adaptive_bilevel, as in {example}, "
            "or a policy of adaptive_bilevel.policies; an optimizer that is made already belongs to other tensors"
        )
    _once(owner, rule, lr)
    chosen = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    number = chosen.pop("start", None) if "start" in chosen else chosen.pop("bound", None)
    if known is BiSPS:
        if chosen.pop("floor_decay") != chosen["decay"] and rule.floor:
            raise OptionError(f"{owner}(rule={rule!r}): the floor of BiSPS decays as its bound; give floor_decay=decay")
        chosen["lr_min"] = chosen.pop("floor")
    if known is DecSPS:
        chosen.pop("decay")
    return known, number, {**chosen, **options}


def _once(owner: str, rule: Any, lr: float | None) -> None:
    if lr is not None:
        raise OptionError(
            f"{owner}(rule={rule!r}, lr={lr!r}): the policy brings its bound or first trial; leave lr out"
        )
