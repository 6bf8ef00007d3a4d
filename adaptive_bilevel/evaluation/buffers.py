"""The buffers of the modules that run inside a closure: as they were before, and as one evaluation left them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .replicated import Replicated

__all__ = ["Buffers", "enter_module", "leave_module", "watching"]


class _Slot:
    """One buffer of one module.

    Attributes:
        met: The tensor that was there before the module ran; under `torch.func.functional_call` it is the caller's.
        before: Its value then.
        after: The value that the marked evaluation left.
        replaced: What the module put in its place, if it did not change it in place.
    """

    __slots__ = ("after", "before", "met", "name", "owner", "replaced")

    def __init__(self, owner: nn.Module, name: str, met: Tensor | None) -> None:
        self.owner, self.name, self.met = owner, name, met
        self.before = _copied(met)
        self.after: Tensor | None = None
        self.replaced = met

    @property
    def value(self) -> Tensor | None:
        return self.replaced

    def write(self, value: Tensor | None) -> None:
        """Give the buffer a value: in the tensor that was there if it fits, so that its storage is kept."""
        if self.met is not None and value is not None and self.met.shape == value.shape:
            # Through .data, unseen by autograd: another sample's graph may hold the buffer, and gets its value back.
            self.met.data.copy_(value)
            target: Tensor | None = self.met
        else:
            target = _copied(value)
        present = self.owner._buffers.get(self.name)
        # What is there may also be a tensor that functional_call has put back; that one is none of ours.
        if present is not target and (present is self.met or present is self.replaced):
            self.owner._buffers[self.name] = target
        self.replaced = target


class Buffers:
    """The buffers of every module that has run since construction, as seen by hooks around the modules' calls.

    Args:
        modules: Modules whose buffers count from now on, whether they run or not.
        variables: Tensors that are no buffers here, though a module may hold them as such: what an optimizer moves.

    Attributes:
        slots: The buffers; where there are none, nothing needs to be put back.
        depth: Number of modules that are running; set to 0 where an evaluation begins.
        replicated: The modules among them whose backward takes means over processes.
    """

    def __init__(self, modules: Sequence[nn.Module] = (), variables: Sequence[Tensor] = ()) -> None:
        self._variables = set(map(id, variables))
        self._seen: dict[int, nn.Module] = {}
        self.slots: list[_Slot] = []
        self._marked = 0
        self.depth = 0
        self.replicated = Replicated()
        self._meet(modules)

    def enter(self, module: nn.Module) -> None:
        """Take note that a module is about to run."""
        self.depth += 1
        self.replicated.meet(module)
        if id(module) in self._seen:
            return
        for part in module.modules():
            if id(part) in self._seen:
                continue
            if any(b is not None and is_lazy(b) for b in part._buffers.values()):
                continue  # met when it has a value
            self._seen[id(part)] = part
            buffers = part._buffers.items()
            self.slots += [_Slot(part, name, buffer) for name, buffer in buffers if id(buffer) not in self._variables]

    def leave(self) -> None:
        """Take note that a module has run; after an outermost one, of the buffers that were replaced."""
        self.depth -= 1
        if self.depth == 0:
            self._look()

    def end(self, failed: bool) -> None:
        """End an evaluation, also one that an interruption has left inside a module."""
        if self.depth > 0:
            self._look()
        self.replicated.free(failed)

    def _look(self) -> None:
        for slot in self.slots:
            slot.replaced = slot.owner._buffers.get(slot.name)

    def _meet(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            self.enter(module)
            self.leave()

    def mark(self) -> None:
        """Remember the present values as those to leave behind."""
        for slot in self.slots:
            slot.after = _copied(slot.value)
        self._marked = len(self.slots)

    def to_before(self, modules: Sequence[nn.Module] = ()) -> None:
        """Put all values back to before.

        Args:
            modules: Modules that may have run unseen, so that what has replaced their buffers is looked at first.
        """
        self._meet(modules)
        for slot in self.slots:
            slot.write(slot.before)

    def to_after(self) -> None:
        """Put all values to those that were marked; a module met since (only inside a trial) goes back to before."""
        for slot in self.slots[: self._marked]:
            slot.write(slot.after)
        for slot in self.slots[self._marked :]:
            slot.write(slot.before)

    def keep_if(self, valid: Tensor) -> None:
        """Keep the present values where `valid` holds, else put them back, without looking at `valid`."""
        for slot in self.slots:
            if slot.value is not None and slot.before is not None and slot.value.shape == slot.before.shape:
                slot.write(torch.where(valid.to(slot.value.device), slot.value, slot.before))


class _Thread(threading.local):
    """Whose modules' calls are seen on this thread.

    Attributes:
        buffers: Receives their buffers; None: no calls are recorded.
    """

    buffers: Buffers | None = None


watching = _Thread()


def enter_module(module: nn.Module, args: Any) -> None:
    """Be torch's hook before every module's call."""
    # Under torch.compile nothing is traced of this: the module that was compiled is met from outside.
    if not torch.compiler.is_compiling() and watching.buffers is not None:
        watching.buffers.enter(module)


def leave_module(module: nn.Module, args: Any, output: Any) -> None:
    """Be torch's hook after every module's call, also after one that raises, without an output."""
    if not torch.compiler.is_compiling() and watching.buffers is not None:
        watching.buffers.leave()
        error = sys.exc_info()[1] if output is None else None
        if error is not None:
            watching.buffers.replicated.broken(module, error)


def _copied(value: Any) -> Any:
    return None if value is None else value.detach().clone()
