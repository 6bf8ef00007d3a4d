"""What stands between closures and torch while they run: backward, zero_grad, autocast, scalers, and calls of modules.

This thread's ``backward()`` goes to whoever listens to the closure, and its ``zero_grad()`` does nothing, since every
``.grad`` has been put aside. Under `in_full_precision`, autocast does nothing. Other threads, and code outside of
closures, are not affected.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from ..errors import ClosureError
from .buffers import Buffers, enter_module, leave_module, watching

__all__ = ["Listener", "Watched", "Watching", "in_full_precision", "installed"]


class Listener(Protocol):
    """Who takes the backward calls of a closure."""

    def backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Take a backward call."""
        ...

    def hide(self) -> None:
        """Record that a part of the graph is hidden: only its backward shows its tensors."""
        ...

    def scaled(self, outputs: Any, found: Any) -> None:
        """Record that a GradScaler has multiplied a loss."""
        ...


class _Thread(threading.local):
    """What this thread evaluates at present."""

    recorder: Listener | None = None
    casts: bool = True


_here = _Thread()


class _Interception:
    """Stands between closures and torch for as long as any thread has a guard open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[int] = set()
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []
        self.backward: Callable[..., None] = torch.autograd.backward
        self.set_autocast: Callable[..., None] = torch.set_autocast_enabled

    def enter(self, user: object) -> None:
        """Stand there for a user, from now on."""
        with self._alone():
            self._users.add(id(user))
            self._install()

    def leave(self, user: object) -> None:
        """Do not stand there for this user any more; calling it twice does no harm, after an interrupt."""
        with self._alone():
            self._users.discard(id(user))
            if not self._users:
                self._remove()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out; a lock that an interrupt has left behind is taken over."""
        self._lock.acquire(timeout=0.5)
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):
                self._lock.release()

    def _install(self) -> None:
        if torch.autograd.backward is _backward:
            return
        self.backward = torch.autograd.backward
        torch.autograd.backward = _backward
        self.set_autocast = torch.set_autocast_enabled
        torch.set_autocast_enabled = _set_autocast  # type: ignore[assignment]
        if not self._hooks:
            # For good: changing a class voids the interpreter's caches, which would cost more than all the rest.
            for owner in (nn.Module, torch.optim.Optimizer):
                owner.zero_grad = _zero_grad(owner.zero_grad)  # type: ignore[method-assign]
            GradScaler.scale = _scale(GradScaler.scale)  # type: ignore[method-assign]
            GradScaler.unscale_ = _unscale(GradScaler.unscale_)  # type: ignore[method-assign]
            CheckpointFunction.apply = _hiding(CheckpointFunction.apply)  # type: ignore[method-assign]
            self._hooks = [
                *_registered(register_module_forward_pre_hook(enter_module)),
                *_registered(register_module_forward_hook(leave_module, always_call=True)),
            ]
        for hooks, number, hook in self._hooks:
            hooks[number] = hook
        _silence_the_warning_about_hooks()

    def _remove(self) -> None:
        if torch.autograd.backward is _backward:
            torch.autograd.backward = self.backward
            torch.set_autocast_enabled = self.set_autocast
        for hooks, number, _ in self._hooks:
            hooks.pop(number, None)


def _registered(handle: RemovableHandle) -> list[tuple[dict[int, Any], int, Any]]:
    """Return what torch has entered where, to be entered again under the same number at each step.

    Registering anew would change the numbers, and compiled code is compiled anew when they change.
    """
    found = [hooks for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref) if (hooks := ref()) is not None]
    return [(hooks, handle.id, hooks[handle.id]) for hooks in found]


installed = _Interception()
"""``installed.enter(self)`` before and ``installed.leave(self)`` after everything that evaluates closures."""


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    if _here.recorder is None:
        installed.backward(tensors, *args, **kwargs)
    else:
        _here.recorder.backward(tensors, *args, **kwargs)


def _set_autocast(*args: Any) -> None:
    """Be torch's function of a device's name (or none) and whether autocast is enabled there."""
    installed.set_autocast(*args[:-1], bool(args[-1]) and _here.casts)


@contextlib.contextmanager
def in_full_precision() -> Iterator[None]:
    """Let autocast do nothing on this thread, around this block and inside, so that losses are in parameters' dtypes.

    Inside of a guard only. A function compiled with autocast inside keeps it.
    """
    with contextlib.ExitStack() as stack:
        for device in {"cpu", *(d.type for d in [torch.accelerator.current_accelerator()] if d is not None)}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        before, _here.casts = _here.casts, False
        try:
            yield
        finally:
            _here.casts = before


def _zero_grad(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        if _here.recorder is None:
            original(self, *args, **kwargs)

    return zero_grad


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        found = original(self, outputs)
        if _here.recorder is not None:
            _here.recorder.scaled(outputs, found)
        return found

    return scale


def _unscale(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def unscale_(self: Any, optimizer: Any) -> None:
        if _here.recorder is not None and self.is_enabled():
            raise ClosureError(
                "the closure called GradScaler.unscale_, which works once per update, while a step runs its closure "
                "several times. Clip to a norm times scaler.get_scale() instead, or use bfloat16, which needs no scaler"
            )
        original(self, optimizer)

    return unscale_


def _hiding(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _here.recorder is not None:
            if not torch.is_grad_enabled():
                return function(*args)  # torch would warn that there will be no gradients
            _here.recorder.hide()
        return original(function, preserve_rng_state, *args)

    return apply


_ABOUT_HOOKS = r"Using `torch\.compile\(module\)` when there are global hooks"
_NO_WARNING = ("ignore", re.compile(_ABOUT_HOOKS, re.IGNORECASE), UserWarning, None, 0)


def _silence_the_warning_about_hooks() -> None:
    """Let torch.compile not warn of hooks that are meant to see what it made."""
    if _NO_WARNING not in warnings.filters:
        warnings.filterwarnings("ignore", message=_ABOUT_HOOKS, category=UserWarning)


class Watching(NamedTuple):
    """Who listens on this thread, and whether graphs are built."""

    recorder: Listener | None
    buffers: Buffers | None
    with_grad: bool

    @staticmethod
    def now() -> Watching:
        """Return what is so now."""
        return Watching(_here.recorder, watching.buffers, torch.is_grad_enabled())

    def restore(self) -> None:
        """Let it be so again."""
        _here.recorder, watching.buffers = self.recorder, self.buffers
        torch.set_grad_enabled(self.with_grad)


class Watched:
    """Send this thread's backward and zero_grad calls to a recorder, and its module calls to buffers.

    Args:
        recorder: None: they do what they always do.
        buffers: None: module calls are not watched.
        with_grad: Whether graphs are built.
    """

    def __init__(self, recorder: Listener | None, buffers: Buffers | None, with_grad: bool) -> None:
        self._recorder, self._buffers, self._with_grad = recorder, buffers, with_grad

    def __enter__(self) -> None:
        self._outer = Watching.now()
        _here.recorder, watching.buffers = self._recorder, self._buffers
        torch.set_grad_enabled(self._with_grad)
        if self._buffers is not None:
            self._buffers.depth = 0

    def __exit__(self, *error: object) -> None:
        self._outer.restore()
        if self._buffers is not None:
            self._buffers.end(error[0] is not None)
