"""The rules of lower problems, as classes that Betty can rebuild from ``defaults``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

import torch
from torch.optim.optimizer import ParamsT

import adaptive_bilevel as core
from adaptive_bilevel.errors import ClosureError, OptionError
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.line_search import LineSearch
from adaptive_bilevel.optim.options import CALLABLE, is_role, merged
from adaptive_bilevel.optim.polyak import DecreasingPolyak, Polyak

__all__ = ["SLS", "SLSB", "SPSB", "UNBOUND", "AutoSLS", "DecSPS", "SPSMax", "records_of"]


@final
class Unbound:
    """The host of an optimizer that `bind` has not given to its problem."""

    def step(self, optimizer: AdaptiveOptimizer) -> NoReturn:
        """Raise.

        Raises:
            ClosureError: Betty stepped an optimizer that was not bound.
        """
        raise ClosureError(
            f"{type(optimizer).__name__}.step(): the optimizer is not bound to its problem. Add  bind(engine)  after "
            "engine = Engine(...)  (from adaptive_bilevel_betty import bind), or use AdaptiveEngine; after "
            "problem.set_optimizer(...) bind again"
        )


UNBOUND = Unbound()

_REMEDY = "name a schedule, or give the problem a scheduler (LambdaLR scales lr)"


def records_of(
    rule: Callable[..., AdaptiveOptimizer], lr: float | None, options: Mapping[str, object]
) -> dict[str, Any]:
    """Return the records of options that an optimizer of the core makes of them.

    Raises:
        OptionError: An option is out of range, or is a function or an object, which Betty loses.
    """
    made = rule([torch.zeros(1, requires_grad=True)], lr, **options)
    for name, value in merged(made.records.values()).items():
        if made.defaults.get(name) == CALLABLE:
            lost = "an object is lost; give a name" if is_role(value) else f"a function is lost; {_REMEDY}"
            raise OptionError(
                f"{type(made).__name__}({name}={value!r}): Betty builds optimizers anew from plain values, where {lost}"
            )
    return made.records


@final
class SPSMax(Polyak):
    """`adaptive_bilevel.SPSMax` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.SPSMax, lr, options))


@final
class DecSPS(DecreasingPolyak):
    """`adaptive_bilevel.DecSPS` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.DecSPS, lr, options))


@final
class SPSB(Polyak):
    """`adaptive_bilevel.SPSB` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.SPSB, lr, options))


@final
class SLS(LineSearch):
    """`adaptive_bilevel.SLS` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.SLS, lr, options))


@final
class SLSB(LineSearch):
    """`adaptive_bilevel.SLSB` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.SLSB, lr, options))


@final
class AutoSLS(LineSearch):
    """`adaptive_bilevel.AutoSLS` as a problem's optimizer: the same options, and ``step()`` after `bind`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        super().__init__(params, lr, **records_of(core.AutoSLS, lr, options))
