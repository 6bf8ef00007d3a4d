"""TorchOpt's backward through ``solve()``, with the module as the lower loop saw it, and with its errors explained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_bilevel.errors import ClosureError, HypergradientError
from adaptive_bilevel.evaluation.guard import RandomState

from ._host import Module

__all__ = ["as_differentiated", "computed_before", "explained", "gradients"]

_NORMS = nn.modules.batchnorm._BatchNorm


def computed_before() -> ClosureError:
    """Return the error for a loss, or a part of it, from before the step."""
    return ClosureError(
        "UpperStep.step(closure=...): the loss that a closure returned, or a part of it, was computed before "
        "step(): no trial can change it, and its graph is gone after one backward. Compute all of it inside, as in "
        "meta.step(lambda: val(inner))"
    )


def explained(error: RuntimeError) -> ClosureError | None:
    """Return the error for a graph that is gone, if this is autograd's: it was one from before the step."""
    return computed_before() if "through the graph a second time" in str(error) else None


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of some tensors through ``solve()``; None where they depend on no such input.

    Raises:
        ClosureError: A part of them was computed and differentiated before.
        HypergradientError: The solver's argnums are not its first ones, or the lower objective draws random numbers or
            changes buffers where TorchOpt's backward cannot be made to see what the loop saw.
    """
    ones = [torch.ones_like(t) for t in outputs]
    random = torch.get_rng_state()
    try:
        found = torch.autograd.grad(list(outputs), list(inputs), ones, retain_graph=retain_graph, allow_unused=True)
    except IndexError as error:
        if not _raised_in_torchopt(error):
            raise
        raise HypergradientError(
            "UpperStep: TorchOpt's backward does not find the arguments that argnums names. It needs them to be the "
            "first ones of the solver after the lower parameters, as in custom_root(..., argnums=1) or (1, 2): put the "
            "upper arguments there"
        ) from error
    except RuntimeError as error:
        if (gone := explained(error)) is not None:
            raise gone from error
        if "mutate a captured Tensor" not in str(error):
            raise
        raise HypergradientError(
            "UpperStep: the lower objective changes a buffer (BatchNorm's running statistics in train mode?), which "
            "TorchOpt's backward refuses. Register the layer in the implicit module, where it is seen to; with a "
            "functional solver make it track_running_stats=False or .eval() it"
        ) from error
    if not torch.equal(random, torch.get_rng_state()):
        raise HypergradientError(
            "UpperStep: the lower objective draws random numbers (dropout?), and TorchOpt's backward drew other ones "
            "than the lower loop, so the hypergradient is that of another objective. Take a LowerStep in a module's "
            "solve(), with which they are drawn again, or .eval() the dropout layers"
        )
    return found


@contextlib.contextmanager
def as_differentiated(module: Module, random: RandomState | None) -> Iterator[None]:
    """While TorchOpt's backward evaluates the module again, let it see what the last lower step saw.

    Its objective draws the dropout masks of that step (and leaves the random state alone), and BatchNorm in train mode
    leaves its running statistics alone, which no derivative depends on and TorchOpt's transforms refuse to change.
    """
    name = "optimality" if type(module)._custom_optimality else "objective"
    original: Callable[..., object] = getattr(module, name)
    devices = sorted({p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}, key=str)

    def replayed(*args: Any, **kwargs: Any) -> object:
        assert random is not None
        present = RandomState(devices)
        random.restore()
        try:
            return original(*args, **kwargs)
        finally:
            present.restore()

    norms = [m for m in _modules(module) if isinstance(m, _NORMS) and m.training and m.track_running_stats]
    shadowed = module.__dict__.get(name)
    try:
        for norm in norms:
            norm.track_running_stats = False
        if random is not None:
            module.__dict__[name] = replayed
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        if shadowed is not None:
            module.__dict__[name] = shadowed
        else:
            module.__dict__.pop(name, None)


def _raised_in_torchopt(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("torchopt.")


def _modules(module: Module) -> list[nn.Module]:
    found = {id(part): part for part in module.modules()}
    for child in module.meta_children():
        found.update({id(part): part for part in child.modules()})
    return list(found.values())
