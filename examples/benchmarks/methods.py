"""The methods by name.

To add one, write a function that makes its hooks and enter it in a table:

    def make(upper, lower, lower_rule, solver, **options) -> Hooks

`upper` and `lower` are lists of tensors, `lower_rule(lower)` makes the lower optimizer, `solver` is the one of the
hypergradient, and the options come from the command line (``--method NAME:key=value,key=value``). When
`Hooks.upper_step` is called, the hypergradient is in `.grad`.

Every bilevel method takes the option ``lower``: a number is SGD with that step at the lower level, "search", "slsb",
"spsb" and "auto" are this package's `SLS`, `SLSB`, `SPSB` and `AutoSLS` with no number given; without it the task's own
rule is used. The option ``solver`` takes the place of the task's setting of that name: the kind of hypergradient.
``search=sls`` is `BiSLS` without the guard of `policies.GuardedSLS`.
``bisls-sgd:response=step`` and ``bisls-adam:response=step`` are the paper's search, `OneStepBiSLS`, as in
`adaptive_bilevel.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, OneStepBiSLS, SPSMax, policies

Closure = Callable[[], Tensor]
Params = list[Tensor]
LowerRule = Callable[[Params], torch.optim.Optimizer]
Second = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Hooks:
    """What the loop calls, and the two optimizers behind it (for their step sizes and records).

    `upper_step` takes the closures of both levels, and a function that gives loss and hypergradient on an independent
    sample of the upper level. `values` counts the upper losses that a step evaluates beyond what `outer` counts itself.
    """

    inner: torch.optim.Optimizer
    outer: Any
    lower_step: Callable[[Closure], Any]
    upper_step: Callable[[Closure, Closure, Second], Any]
    values: int = 0
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext


class Unavailable(ImportError):
    """A method whose package is not installed."""


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


SEARCHES = {"sls": policies.SLS()}
LOWER_RULES: dict[Any, LowerRule] = {"search": SLS, "slsb": SLSB, "spsb": SPSB, "auto": AutoSLS}


def lower_rule(choice: float | str | None, own: LowerRule) -> LowerRule:
    """The lower level's optimizer, by the option ``lower``."""
    if choice is None:
        return own
    if choice in LOWER_RULES:
        return LOWER_RULES[choice]
    return partial(torch.optim.SGD, lr=float(choice))


# Bilevel.


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

    def upper_step(upper_closure: Closure, lower_closure: Closure, second: Second) -> None:
        outer.step()
        advance()

    return Hooks(inner, outer, plain_step(inner, lower), upper_step)


def searched(
    direction: str,
    upper: Params,
    lower: Params,
    lower_rule: LowerRule,
    solver: Any,
    *,
    response: str = "tangent",
    search: str | None = None,
    **options: Any,
) -> Hooks:
    """BiSLS, or the paper's one-step search; `options` are its own, and without `lr` the first trial is found."""
    inner = lower_rule(lower)
    if search is not None:
        options["search"] = SEARCHES[search]
    outer: BiSLS | OneStepBiSLS
    if response == "step":
        outer = OneStepBiSLS(upper, lower=inner, direction=direction, **options)
    else:
        outer = BiSLS(upper, lower=inner, direction=direction, response=response, solver=solver, **options)
    told = is_stock(inner)  # this package's own lower optimizers remember their closure, others are told

    def upper_step(upper_closure: Closure, lower_closure: Closure, second: Second) -> None:
        outer.step(upper_closure, lower_closure) if told else outer.step(upper_closure)

    return Hooks(inner, outer, plain_step(inner, lower), upper_step)


def polyak(upper: Params, lower: Params, lower_rule: LowerRule, solver: Any, **options: Any) -> Hooks:
    """BiSPS; `options` are its own."""
    inner = lower_rule(lower)
    outer = BiSPS(upper, lower=inner, **options)

    def upper_step(upper_closure: Closure, lower_closure: Closure, second: Second) -> None:
        outer.step(upper_closure)

    return Hooks(inner, outer, plain_step(inner, lower), upper_step)


class TwoSamplePolyak(torch.optim.SGD):
    """BiSPS whose step size comes from loss and hypergradient on an independent sample, as in the paper's Theorem 3."""

    def __init__(self, params: Params, lr: float, **options: Any) -> None:
        super().__init__(params, lr=lr)
        self.policy = policies.Envelope(bound=lr, decay="inverse_sqrt", **options)
        self.rule_state = self.policy.init()

    def step_by(self, loss: Tensor, hypergradient: Iterable[Tensor]) -> None:
        slope = sum(float(h.square().sum()) for h in hypergradient)
        record, self.rule_state = self.policy.step(self.rule_state, loss=float(loss), slope=slope)
        self.param_groups[0]["lr"] = record.step_size
        self.step()


def two_sample_polyak(
    upper: Params, lower: Params, lower_rule: LowerRule, solver: Any, *, lr: float, **options: Any
) -> Hooks:
    inner, outer = lower_rule(lower), TwoSamplePolyak(upper, lr, **options)
    return Hooks(inner, outer, plain_step(inner, lower), lambda f, g, second: outer.step_by(*second()))


def peer(
    package: str, name: str, upper: Params, lower: Params, lower_rule: LowerRule, solver: Any, **options: Any
) -> Hooks:
    """An optimizer of another package at the upper level, by its own defaults; optional."""
    try:
        kind = getattr(import_module(package), name)
    except ImportError as missing:
        raise Unavailable(f"{name} is in the package {package!r}, which is not installed.") from missing
    inner, outer = lower_rule(lower), kind(upper, **options)
    wants_loss = package == "momo"

    def upper_step(upper_closure: Closure, lower_closure: Closure, second: Second) -> None:
        if wants_loss:
            with torch.no_grad():
                loss = upper_closure()
            outer.step(loss=loss)
        else:
            outer.step()

    if package != "schedulefree":
        return Hooks(inner, outer, plain_step(inner, lower), upper_step, values=int(wants_loss))

    @contextmanager
    def evaluating() -> Iterator[None]:  # it keeps two points: one to differentiate at, one to evaluate
        outer.eval()
        yield
        outer.train()

    outer.train()
    return Hooks(inner, outer, plain_step(inner, lower), upper_step, evaluating=evaluating)


PEERS = {
    "momo": ("momo", "Momo"),
    "momo-adam": ("momo", "MomoAdam"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "d-adapt-adam": ("dadaptation", "DAdaptAdam"),
    "schedule-free": ("schedulefree", "AdamWScheduleFree"),
}
BILEVEL: dict[str, Callable[..., Hooks]] = {
    "sgd": partial(fixed, torch.optim.SGD),
    "adam": partial(fixed, torch.optim.Adam),
    "bisps": polyak,
    "bisps-2": two_sample_polyak,
    "bisls-sgd": partial(searched, "sgd"),
    "bisls-adam": partial(searched, "adam"),
    **{name: partial(peer, *where) for name, where in PEERS.items()},
}


ROWS = ("s-tfbo", "d-tfbo")  # whole algorithms of `adaptive_bilevel.methods`; see `loop.train_row`


# Single level.


SingleStep = Callable[[Closure, Closure], Any]
Single = tuple[torch.optim.Optimizer, SingleStep]


def scheduled(
    kind: Callable[..., torch.optim.Optimizer], params: Params, *, lr: float, decay: str = "constant"
) -> Single:
    """A baseline of torch's, with a step size that somebody chose."""
    optimizer = kind(params, lr=lr)
    step, advance = plain_step(optimizer, params), decay_lr(optimizer, decay)

    def both(closure: Closure, second: Closure) -> None:
        step(closure)
        advance()

    return optimizer, both


def adaptive(kind: Callable[..., Any], params: Params, *, two_sample: bool = False, **options: Any) -> Single:
    """A single-level rule of this package; `two_sample` takes the step size from a second, independent batch."""
    optimizer = kind(params, **options)
    if two_sample:
        return optimizer, lambda closure, second: optimizer.step(closure, step_closure=second)
    return optimizer, lambda closure, second: optimizer.step(closure)


def single_peer(package: str, name: str, params: Params, **options: Any) -> Single:
    """An optimizer of another package; optional."""
    hooks = peer(package, name, params, [], lambda lower: torch.optim.SGD(params), None, **options)

    def step(closure: Closure, second: Closure) -> None:
        loss = closure()
        for tensor, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
            tensor.grad = gradient
        hooks.upper_step(lambda: loss.detach(), lambda: loss, lambda: (loss, ()))

    return hooks.outer, step


SINGLE_LEVEL: dict[str, Callable[..., Single]] = {
    "sgd": partial(scheduled, torch.optim.SGD),
    "adam": partial(scheduled, torch.optim.Adam),
    "sps-max": partial(adaptive, SPSMax),
    "decsps": partial(adaptive, DecSPS),
    "spsb": partial(adaptive, SPSB),
    "sls": partial(adaptive, SLS),
    "slsb": partial(adaptive, SLSB),
    "auto-sls": partial(adaptive, AutoSLS),
    **{name: partial(single_peer, *where) for name, where in PEERS.items() if name != "schedule-free"},
}
