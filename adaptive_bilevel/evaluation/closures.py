"""What a closure does while it is evaluated, whichever way it is written.

A closure may call backward or not, once or once per micro-batch, and zero_grad before; it may return the loss, its
value, or (after a backward) nothing. While one runs, this thread's ``backward()`` goes to a `Recorder` and its
``zero_grad()`` does nothing, since gradients are the guard's affair: code between ``backward()`` and the return sees no
``.grad``. Other threads, and code outside of closures, notice nothing.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..errors import ClosureError
from .buffers import Buffers, enter_module, leave_module, watching

__all__ = ["Closure", "attached", "differentiated", "installed", "require_closure", "value", "value_of"]

Closure = Callable[[], Any]
"""A zero-argument function returning the loss; with or without zero_grad and backward inside."""


class _Thread(threading.local):
    """What this thread evaluates at present."""

    recorder: Recorder | None = None


_here = _Thread()


class _Interception:
    """Stands between closures and torch for as long as any thread has a guard open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []
        self.backward: Callable[..., None] = torch.autograd.backward

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._install()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._remove()

    def _install(self) -> None:
        self.backward = torch.autograd.backward
        torch.autograd.backward = _backward
        if not self._hooks:
            # For good: changing a class voids the interpreter's caches, which would cost more than all the rest.
            for owner in (nn.Module, torch.optim.Optimizer):
                owner.zero_grad = _zero_grad(owner.zero_grad)  # type: ignore[method-assign]
            self._hooks = [
                *_registered(register_module_forward_pre_hook(enter_module)),
                *_registered(register_module_forward_hook(leave_module, always_call=True)),
            ]
        for hooks, number, hook in self._hooks:
            hooks[number] = hook
        _silence_the_warning_about_hooks()

    def _remove(self) -> None:
        torch.autograd.backward = self.backward
        for hooks, number, _ in self._hooks:
            hooks.pop(number, None)


def _registered(handle: RemovableHandle) -> list[tuple[dict[int, Any], int, Any]]:
    """Return what torch has entered where, to be entered again under the same number at each step.

    Registering anew would change the numbers, and compiled code is compiled anew when they change.
    """
    found = [hooks for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref) if (hooks := ref()) is not None]
    return [(hooks, handle.id, hooks[handle.id]) for hooks in found]


installed = _Interception()
"""``with installed:`` around everything that evaluates closures; it nests."""


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    if _here.recorder is None:
        installed.backward(tensors, *args, **kwargs)
    else:
        _here.recorder.backward(tensors, *args, **kwargs)


def _zero_grad(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        if _here.recorder is None:
            original(self, *args, **kwargs)

    return zero_grad


_ABOUT_HOOKS = r"Using `torch\.compile\(module\)` when there are global hooks"
_NO_WARNING = ("ignore", re.compile(_ABOUT_HOOKS, re.IGNORECASE), UserWarning, None, 0)


def _silence_the_warning_about_hooks() -> None:
    """Let torch.compile not warn of hooks that are meant to see what it made."""
    if _NO_WARNING not in warnings.filters:
        warnings.filterwarnings("ignore", message=_ABOUT_HOOKS, category=UserWarning)


class Watched:
    """Send this thread's backward and zero_grad calls to a recorder, and its module calls to buffers.

    Args:
        recorder: None: they do what they always do.
        buffers: None: nobody looks at module calls.
        with_grad: Whether graphs are built.
    """

    def __init__(self, recorder: Recorder | None, buffers: Buffers | None, with_grad: bool) -> None:
        self._recorder, self._buffers, self._with_grad = recorder, buffers, with_grad

    def __enter__(self) -> None:
        self._outer = _here.recorder, watching.buffers, torch.is_grad_enabled()
        _here.recorder, watching.buffers = self._recorder, self._buffers
        torch.set_grad_enabled(self._with_grad)
        if self._buffers is not None:
            self._buffers.depth = 0

    def __exit__(self, *error: object) -> None:
        _here.recorder, watching.buffers, with_grad = self._outer
        torch.set_grad_enabled(with_grad)
        if self._buffers is not None and self._buffers.depth > 0:
            self._buffers.end()


class Recorder:
    """What a closure did and returned: the loss, whichever way the closure is written.

    A backward is put off until the closure has returned, since an attached loss is differentiated directly (and not,
    for example, the scaled loss of a GradScaler). A second backward in one closure is gradient accumulation: from then
    on each runs at once, so that no more than two micro-batches' graphs are ever alive.

    Args:
        inputs: What to differentiate by, into ``.grad``; None: nothing is differentiated.
    """

    def __init__(self, inputs: list[Tensor] | None) -> None:
        self._inputs = inputs
        self._waiting: tuple[Tensor, bool] | None = None
        self._losses: list[Tensor] = []  # of the backwards that ran; without inputs, of all

    def backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Take a backward call of the closure."""
        many = tuple(tensors) if isinstance(tensors, (tuple, list)) else (tensors,)
        weights = tuple(grad_tensors) if isinstance(grad_tensors, (tuple, list)) else (grad_tensors,) * len(many)
        loss = _total([_scalar(t if w is None else (t * w).sum()) for t, w in zip(many, weights, strict=True)])
        if self._inputs is None:
            self._losses.append(loss)
        elif self._waiting is None and not self._losses:
            self._waiting = loss, bool(retain_graph)
        else:
            if self._waiting is not None:
                self._run(*self._waiting)
                self._waiting = None
            self._run(loss, bool(retain_graph))

    def _run(self, loss: Tensor, retain_graph: bool = False) -> None:
        if self._inputs:  # an empty list would mean all leaves
            with Watched(None, None, True):  # a backward may call backward (checkpointing does), or run modules again
                installed.backward(loss, retain_graph=retain_graph, inputs=self._inputs)
        self._losses.append(loss.detach())

    def attached(self, returned: Any) -> Tensor:
        """Return the loss with its graph."""
        if isinstance(returned, Tensor) and returned.requires_grad:
            return _scalar(returned)
        losses = [*self._losses, *([] if self._waiting is None else [self._waiting[0]])]
        if not losses:
            value_of(returned)
            raise ClosureError(
                f"the closure returned {_kind(returned)} and called no backward: return the loss itself, attached to "
                "its graph (no .item(), .detach() or torch.no_grad())"
            )
        return _total(losses)

    def differentiated(self, returned: Any) -> Tensor:
        """Run what was put off, and return the detached loss."""
        if not self._losses:
            loss = self.attached(returned)
            self._run(loss)
            if returned is None or (isinstance(returned, Tensor) and returned.requires_grad):
                return loss.detach()
        loss = _total(self._losses)
        if returned is not None:
            _compare(value_of(returned), loss)
        return loss

    def value(self, returned: Any) -> Tensor | float:
        """Return the loss without its graph."""
        if returned is None and self._losses:
            return _total([loss.detach() for loss in self._losses])
        return value_of(returned)


def differentiated(closure: Closure, inputs: list[Tensor], buffers: Buffers) -> Tensor:
    """Call the closure, differentiate its loss into ``.grad`` of the inputs, and return the detached loss."""
    recorder = Recorder(inputs)
    with Watched(recorder, buffers, True):
        return recorder.differentiated(closure())


def attached(closure: Closure, buffers: Buffers) -> Tensor:
    """Call the closure, and return its loss with its graph."""
    recorder = Recorder(None)
    with Watched(recorder, buffers, True):
        return recorder.attached(closure())


def value(closure: Closure, buffers: Buffers, *, with_grad: bool = False) -> Tensor | float:
    """Call the closure, and return its loss without a graph."""
    recorder = Recorder(None)
    with Watched(recorder, buffers, with_grad):
        return recorder.value(closure())


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _compare(returned: Tensor | float, differentiated: Tensor) -> None:
    """Refuse a closure whose backward was not that of the value it returned."""
    value, reference = float(returned), float(differentiated)
    if abs(value - reference) > 1e-2 * max(abs(value), abs(reference)):
        raise ClosureError(
            f"the closure returned {value} but called backward on a loss of {reference}: call backward on the loss "
            "that is returned (a GradScaler's scaled loss is not it), or leave backward out"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)}" + (
            "" if value.requires_grad else " without a graph"
        )
    return f"{value!r} of type {type(value).__name__}"


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or loss.is_complex() or loss.layout is not torch.strided:
        raise ClosureError(f"the closure returned {_kind(loss)}: return one real number, e.g. loss.mean()")
    return loss if loss.dim() == 0 else loss.reshape(())


def value_of(returned: Any) -> Tensor | float:
    """Return a loss's value, detached; a number if it was one."""
    if isinstance(returned, Tensor):
        return _scalar(returned).detach()
    if isinstance(returned, Real) or getattr(returned, "shape", None) == ():
        return float(returned)
    raise ClosureError(f"the closure returned {_kind(returned)}: return the loss, a tensor with one element")


def require_closure(owner: str, closure: Any) -> Closure:
    """Return the closure, or raise where there is none to evaluate."""
    if not callable(closure):
        raise ClosureError(
            f"{owner}.step(closure={closure!r}): the rule evaluates the loss, so step needs a closure that returns it, "
            "e.g. optimizer.step(lambda: loss_fn(model(x), y))"
        )
    return closure  # type: ignore[no-any-return]
