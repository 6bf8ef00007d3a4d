"""Modules whose backward takes means over processes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import processes

__all__ = ["Replicated"]

Wrapped = nn.parallel.DistributedDataParallel


class Replicated:
    """The `torch.nn.parallel.DistributedDataParallel` modules that have run in an evaluation.

    Their backward leaves means in ``.grad`` already, where it reaches all of their parameters and is not under
    ``no_sync``.
    """

    def __init__(self) -> None:
        self._synced: dict[nn.Module, bool] = {}

    def meet(self, module: nn.Module) -> None:
        """Take note of a module that runs."""
        if isinstance(module, Wrapped):
            self._synced[module] = bool(module.require_backward_grad_sync)

    def forget(self) -> None:
        """Forget all modules."""
        self._synced = {}

    def averaged(self, inputs: Sequence[Tensor]) -> set[int]:
        """Return the ids of those tensors whose gradients are means already."""
        wanted, found = {id(p) for p in inputs}, set[int]()
        for module, synced in self._synced.items():
            wrapped: Any = module
            ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
            named = wrapped.module.named_parameters()
            own = {id(p) for name, p in named if p.requires_grad and name not in ignored}
            if synced and own <= wanted and wrapped.process_group.size() == processes.count():
                found |= own
        return found
