"""TorchOpt's backward through ``solve()`` evaluates the module again: as the lower loop saw it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from adaptive_bilevel.evaluation.guard import RandomState

from ._host import Module

__all__ = ["as_differentiated"]

_NORMS = nn.modules.batchnorm._BatchNorm


@contextlib.contextmanager
def as_differentiated(module: Module, random: RandomState | None) -> Iterator[None]:
    """While TorchOpt's backward evaluates the module again, let it see what the last lower step saw.

    Its objective draws the dropout masks of that step (and leaves the random state alone), and BatchNorm in train mode
    leaves its running statistics alone, which no derivative depends on and TorchOpt's transforms cannot change.
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


def _modules(module: Module) -> list[nn.Module]:
    found = {id(part): part for part in module.modules()}
    for child in module.meta_children():
        found.update({id(part): part for part in child.modules()})
    return list(found.values())
