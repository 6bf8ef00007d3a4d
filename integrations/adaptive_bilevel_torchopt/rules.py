"""Which optimizer of the core steps a level: named by its class, or by a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, final

import torch
from torch.optim.optimizer import ParamsT

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, SPSMax, policies
from adaptive_bilevel.bilevel.upper import UpperOptimizer
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from .direction import DirectionOption, as_direction, as_stepped

__all__ = ["Recipe", "Rule", "lower_recipe", "made_once", "upper_recipe"]

Rule: TypeAlias = "type[AdaptiveOptimizer] | policies.Policy[Any]"
"""A class of the core, or a policy with options of its own, e.g. ``policies.Constant(bound=0.1)``."""

O = TypeVar("O", bound=AdaptiveOptimizer)  # noqa: E741

_LOWER: dict[type, type[AdaptiveOptimizer]] = {
    policies.SPSMax: SPSMax,
    policies.DecSPS: DecSPS,
    policies.SPSB: SPSB,
    policies.SLS: SLS,
    policies.SLSB: SLSB,
    policies.AutoSLS: AutoSLS,
}
_UPPER: dict[type, type[UpperOptimizer]] = {policies.SLS: BiSLS, policies.Envelope: BiSPS}
_NO_BOUND = -1e300  # Polyak's ratio then is above any bound, so the step is the bound


@final
@dataclass(frozen=True)
class Recipe(Generic[O]):
    """An optimizer of the core before there are tensors: its class, its lr and its options."""

    cls: Callable[..., O]
    lr: float | None
    options: Mapping[str, object]

    def make(self, params: ParamsT) -> O:
        """Return the optimizer for some tensors."""
        return self.cls(params, self.lr, **self.options)


def lower_recipe(
    owner: str, rule: Rule, lr: float | None, direction: DirectionOption, options: Mapping[str, object]
) -> Recipe[AdaptiveOptimizer]:
    """Return the optimizer of a lower level.

    Args:
        owner: Name for errors.
        rule: The rule.
        lr: The bound or first trial; a policy brings its own.
        direction: The direction.
        options: Options that were given by keyword.

    Raises:
        OptionError: The rule is none of this level, or both it and `lr` name a number.
    """
    if isinstance(rule, type) and issubclass(rule, AdaptiveOptimizer) and not issubclass(rule, UpperOptimizer):
        return Recipe(rule, lr, {**options, "direction": as_direction(direction)})
    if isinstance(rule, policies.Constant):
        _once(owner, rule, lr)
        floor = {"floor": rule.bound, "decay": rule.decay, "floor_decay": rule.decay}
        return Recipe(SPSMax, rule.bound, {**floor, **_constant(direction, options)})
    known = _LOWER.get(type(rule))
    if known is None:
        raise _unknown(owner, rule, "SPSMax, DecSPS, SPSB, SLS, SLSB or AutoSLS", "LowerStep(self, AutoSLS)")
    number, chosen = _of_policy(owner, rule, lr)
    if known is DecSPS:
        chosen.pop("decay")
    return Recipe(known, number, {**chosen, **options, "direction": as_direction(direction)})


def upper_recipe(
    owner: str, rule: Rule, lr: float | None, direction: DirectionOption, options: Mapping[str, object]
) -> Recipe[UpperOptimizer]:
    """Return the optimizer of an upper level; arguments and errors as for `lower_recipe`."""
    if isinstance(rule, type) and issubclass(rule, UpperOptimizer):
        return Recipe(rule, lr, {**options, "direction": as_direction(direction)})
    if isinstance(rule, policies.Constant):
        _once(owner, rule, lr)
        return Recipe(BiSPS, rule.bound, {"lr_min": rule.bound, "decay": rule.decay, **_constant(direction, options)})
    known = _UPPER.get(type(rule))
    if known is None:
        raise _unknown(owner, rule, "BiSLS or BiSPS", "UpperStep([x], lower=inner.lower, rule=BiSLS)")
    number, chosen = _of_policy(owner, rule, lr)
    if isinstance(rule, policies.Envelope):
        if chosen.pop("floor_decay") != chosen["decay"] and rule.floor:
            raise OptionError(f"{owner}(rule={rule!r}): the floor of BiSPS decays as its bound; give floor_decay=decay")
        chosen["lr_min"] = chosen.pop("floor")
    return Recipe(known, number, {**chosen, **options, "direction": as_direction(direction)})


def made_once(recipe: Recipe[O]) -> Recipe[O]:
    """Return a recipe whose options an optimizer has taken: wrong ones raise an error here, not inside ``solve()``."""
    recipe.make([torch.zeros(1, requires_grad=True)])
    return recipe


def _constant(direction: DirectionOption, options: Mapping[str, object]) -> dict[str, object]:
    """Return the options of a constant step."""
    adam: dict[str, Any] = {name: options[name] for name in ("betas", "eps") if name in options}
    if as_direction(direction) == "adam":  # TorchOpt's: they are its constants, and none of the rule's
        options = {name: value for name, value in options.items() if name not in adam}
    return {"lower_bound": _NO_BOUND, **options, "direction": as_stepped(direction, **adam)}


def _of_policy(owner: str, rule: Any, lr: float | None) -> tuple[float | None, dict[str, object]]:
    """Return the bound or first trial of a policy, and its other options."""
    _once(owner, rule, lr)
    chosen = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return chosen.pop("start" if "start" in chosen else "bound", None), chosen


def _once(owner: str, rule: object, lr: float | None) -> None:
    if lr is not None:
        raise OptionError(
            f"{owner}(rule={rule!r}, lr={lr!r}): the policy brings its bound or first trial; leave lr out"
        )


def _unknown(owner: str, rule: object, names: str, example: str) -> OptionError:
    return OptionError(
        f"{owner}(rule={rule!r}): rule must be one of the classes {names} of adaptive_bilevel, as in {example}, "
        "or a policy of adaptive_bilevel.policies; an optimizer that is made already belongs to other tensors"
    )
