"""Modules whose backward takes means over processes by itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..errors import ClosureError, ProcessError, TensorError
from . import processes
from .parts import in_parts

__all__ = ["Replicated"]

Wrapped = nn.parallel.DistributedDataParallel

_parameters: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()
"""The parameters in parts of each `fully_shard` module."""


class Replicated:
    """The modules that have run in an evaluation, as far as their backward takes means.

    `torch.nn.parallel.DistributedDataParallel` leaves them in ``.grad`` where it reaches all of its parameters and is
    not under ``no_sync``. `torch.distributed.fsdp.fully_shard` leaves them in ``.grad`` of all of its parameters,
    whichever the backward is asked for.

    `fully_shard` keeps copies of whole parameters between a forward and its backward (a root module does by default).
    They are freed at the end of an evaluation, since parameters move between evaluations.
    """

    def __init__(self) -> None:
        self._synced: dict[nn.Module, bool] = {}
        self._sharding: dict[nn.Module, None] = {}

    def meet(self, module: nn.Module) -> None:
        """Take note of a module that runs.

        Raises:
            ClosureError: Its backward is not to take means, though its parameters are in parts.
            ProcessError: It exchanges something in its forward, and another process has failed.
        """
        if isinstance(module, Wrapped):
            self._synced[module] = bool(module.require_backward_grad_sync)
            if module.will_sync_module_buffers():
                processes.ready()
        elif hasattr(module, "_get_fsdp_state"):
            _require_means(module)
            state = cast(Any, module)._get_fsdp_state()
            if getattr(state, "_is_root", None) is not False:  # of inner ones, the outermost has asked
                processes.ready()
            self._sharding[module] = None
            if module not in _parameters:
                cast(Any, module).reshard()
                _parameters[module] = [p for p in module.parameters() if in_parts(p)]

    def broken(self, module: nn.Module, error: BaseException) -> None:
        """Take note of a module that an error leaves.

        Where it has parts that gather their parameters themselves, the other processes are in these.
        """
        if module in self._sharding and not isinstance(error, ProcessError):
            if sum(hasattr(one, "_get_fsdp_state") for one in module.modules()) > 1:
                processes.amid()

    @property
    def found(self) -> bool:
        """Whether such a module has run."""
        return bool(self._synced or self._sharding)

    def forget(self) -> None:
        """Forget all modules."""
        self._synced, self._sharding = {}, {}

    def free(self, failed: bool) -> None:
        """Free copies of whole parameters.

        Args:
            failed: Whether the evaluation has raised, perhaps in the middle of a module.
        """
        for module in self._sharding:
            if failed:
                with contextlib.suppress(AttributeError, RuntimeError):  # old versions of torch, inner modules
                    cast(Any, module).reset_iter_state()
            cast(Any, module).reshard()

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Take note of an error of a backward, in which modules may exchange something."""
        try:
            yield
        except Exception:
            if self._sharding or any(self._synced.values()):
                processes.amid()
            raise

    def parts(self) -> list[Tensor]:
        """Return the parameters in parts, whose ``.grad`` every backward writes to."""
        return list({id(p): p for module in self._sharding for p in _parameters[module]}.values())

    def averaged(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> set[int]:
        """Return the ids of those tensors whose gradients are means already.

        Args:
            inputs: The tensors.
            gradients: Theirs.

        Raises:
            TensorError: A tensor in parts has a gradient that no module of `fully_shard` has left.
        """
        wanted, found = {id(p) for p in inputs}, set[int]()
        for module, synced in self._synced.items():
            wrapped: Any = module
            ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
            named = wrapped.module.named_parameters()
            own = {id(p) for name, p in named if p.requires_grad and name not in ignored}
            if synced and own <= wanted and wrapped.process_group.size() == processes.count():
                found |= own
        known = {id(p) for p in self.parts()}
        for p, g in zip(inputs, gradients, strict=True):
            if in_parts(p):
                found.add(id(p))
                if g is not None and id(p) not in known:
                    raise TensorError(
                        f"a parameter of shape {tuple(p.shape)} is a DTensor of no fully_shard module that the closure "
                        "runs, so its gradient is not averaged: call torch.distributed.fsdp.fully_shard "
                        "on the module that holds it, or keep it whole"
                    )
        return found


def _require_means(module: Any) -> None:
    state = module._get_fsdp_state()  # what set_requires_gradient_sync sets can be read nowhere else
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    if not all(getattr(group, name, True) for group in groups for name in ("reduce_grads", "all_reduce_grads")):
        raise ClosureError(
            "the closure runs a fully_shard module under set_requires_gradient_sync(False), and the step cannot "
            "use such a gradient: let each backward reduce, or add up the losses of micro-batches and call none"
        )
