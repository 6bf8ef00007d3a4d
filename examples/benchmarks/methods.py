"""The methods by name.

To add one, write a function that makes its hooks and enter it in a table:

    def make(upper, lower, lower_rule, solver, **options) -> Hooks

`upper` and `lower` are lists of tensors, `lower_rule(lower)` is the task's lower optimizer, `solver` is the one of the
hypergradient, and the options come from the command line (``--method NAME:key=value,key=value``). When
`Hooks.upper_step` is called, the hypergradient is in `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, BiSPS, DecSPS, SPSMax

Closure = Callable[[], Tensor]
Params = list[Tensor]
LowerRule = Callable[[Params], torch.optim.Optimizer]


@dataclass
class Hooks:
    """What the loop calls, and the two optimizers behind it (for their step sizes and records)."""

    inner: torch.optim.Optimizer
    outer: torch.optim.Optimizer
    lower_step: Callable[[Closure], Any]
    upper_step: Callable[[Closure, Closure], Any]


def is_stock(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's own, which need a backward pass before the step and know no trials."""
    return type(optimizer).__module__.startswith("torch.optim")


def plain_step(optimizer: Any, params: Iterable[Tensor]) -> Callable[[Closure], Any]:
    """A step from a closure that only returns the loss; torch's optimizers need the gradient to be set first."""
    if not is_stock(optimizer):
        return lambda closure: optimizer.step(closure)
    tensors = list(params)

    def step(closure: Closure) -> None:
        for tensor, gradient in zip(tensors, torch.autograd.grad(closure(), tensors), strict=True):
            tensor.grad = gradient
        optimizer.step()

    return step


def decay_lr(optimizer: torch.optim.Optimizer, decay: str) -> Callable[[], None]:
    """What to call after each step, so that lr follows 1, 1/sqrt(k+1) or 1/(k+1)."""
    factors = {"constant": lambda k: 1.0, "inverse_sqrt": lambda k: (k + 1) ** -0.5, "inverse": lambda k: 1 / (k + 1)}
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[decay]).step


def fixed(
    kind: Callable[..., torch.optim.Optimizer],
    upper: Params,
    lower: Params,
    lower_rule: LowerRule,
    solver: Any,
    *,
    lr: float,
    decay: str = "constant",
) -> Hooks:
    """A baseline: one of torch's optimizers at the upper level, with a step size that somebody chose."""
    inner, outer = lower_rule(lower), kind(upper, lr=lr)
    advance = decay_lr(outer, decay)

    def upper_step(upper_closure: Closure, lower_closure: Closure) -> None:
        outer.step()
        advance()

    return Hooks(inner, outer, plain_step(inner, lower), upper_step)


def searched(direction: str, upper: Params, lower: Params, lower_rule: LowerRule, solver: Any, **options: Any) -> Hooks:
    """BiSLS; `options` are its own, and without `lr` it finds the first trial by itself."""
    inner = lower_rule(lower)
    outer = BiSLS(upper, lower=inner, direction=direction, solver=solver, **options)
    return Hooks(inner, outer, plain_step(inner, lower), with_lower_closure(outer, inner))


def polyak(upper: Params, lower: Params, lower_rule: LowerRule, solver: Any, **options: Any) -> Hooks:
    """BiSPS; `options` are its own."""
    inner = lower_rule(lower)
    outer = BiSPS(upper, lower=inner, **options)
    return Hooks(inner, outer, plain_step(inner, lower), lambda upper_closure, lower_closure: outer.step(upper_closure))


def with_lower_closure(outer: Any, inner: torch.optim.Optimizer) -> Callable[[Closure, Closure], Any]:
    """The upper step of this package: its own lower optimizers remember their closure, others are told."""
    if is_stock(inner):
        return lambda upper_closure, lower_closure: outer.step(upper_closure, lower_closure)
    return lambda upper_closure, lower_closure: outer.step(upper_closure)


BILEVEL: dict[str, Callable[..., Hooks]] = {
    "sgd": partial(fixed, torch.optim.SGD),
    "adam": partial(fixed, torch.optim.Adam),
    "bisps": polyak,
    "bisls-sgd": partial(searched, "sgd"),
    "bisls-adam": partial(searched, "adam"),
}


SingleStep = Callable[[Closure, Closure], Any]


def decaying_sgd(params: Params, *, lr: float, decay: str = "inverse_sqrt") -> tuple[torch.optim.Optimizer, SingleStep]:
    """The single-level baseline."""
    optimizer = torch.optim.SGD(params, lr=lr)
    step, advance = plain_step(optimizer, params), decay_lr(optimizer, decay)

    def both(closure: Closure, second: Closure) -> None:
        step(closure)
        advance()

    return optimizer, both


def adaptive(
    kind: Callable[..., Any], params: Params, *, two_sample: bool = False, **options: Any
) -> tuple[torch.optim.Optimizer, SingleStep]:
    """A single-level rule of this package; `two_sample` takes the step size from a second, independent batch."""
    optimizer = kind(params, **options)
    if two_sample:
        return optimizer, lambda closure, second: optimizer.step(closure, step_closure=second)
    return optimizer, lambda closure, second: optimizer.step(closure)


SINGLE_LEVEL: dict[str, Callable[..., tuple[torch.optim.Optimizer, SingleStep]]] = {
    "sgd": decaying_sgd,
    "sps-max": partial(adaptive, SPSMax),
    "decsps": partial(adaptive, DecSPS),
    "spsb": partial(adaptive, SPSB),
    "sls": partial(adaptive, SLS, reset="initial"),
    "slsb": partial(adaptive, SLSB, reset="initial"),
}
