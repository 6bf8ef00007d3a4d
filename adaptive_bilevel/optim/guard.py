"""A trial leaves no trace: parameters, buffers, gradients and random state come back exactly as they were.

One `Guard` spans one optimizer step. It evaluates the user's closures, on the current point or elsewhere, and puts
everything back by copy (never by adding and subtracting), whatever happens, exceptions and KeyboardInterrupt included:

* parameters: copied into a workspace that is allocated once;
* buffers: of every module that runs inside a closure (found by a forward hook), BatchNorm's counters included;
* random state: of the CPU and of the parameters' devices; every trial replays the same dropout mask;
* gradients: a ``backward()`` inside a closure is intercepted; it reaches no ``.grad`` but through this module.

What it cannot see: random generators other than torch's default ones, and what the closure does to Python objects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import ClosureError

__all__ = ["Closure", "Guard", "RandomState", "Workspace"]

Closure = Callable[[], Any]
"""A zero-argument function returning the loss; with or without zero_grad and backward inside."""


class RandomState:
    """The default random generators of the CPU and of some devices, at the time of construction."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Put the generators back to that time."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


class _Buffers:
    """The buffers of the modules that ran, as they were before each module ran for the first time."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._owners: list[tuple[nn.Module, str]] = []
        self._tensors: list[Tensor] = []
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._thread = threading.get_ident()

    @contextmanager
    def watch(self) -> Iterator[None]:
        handle = register_module_forward_pre_hook(self._meet)
        try:
            yield
        finally:
            handle.remove()

    def _meet(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._seen or threading.get_ident() != self._thread:
            return
        for part in module.modules():
            if id(part) in self._seen:
                continue
            self._seen.add(id(part))
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._owners.append((part, name))
                    self._tensors.append(buffer)
                    self._before.append(buffer.detach().clone())

    def mark(self) -> None:
        self._after = [part._buffers[name].detach().clone() for part, name in self._owners]  # type: ignore[union-attr]

    def to_before(self) -> None:
        self._write(self._before)

    def to_after(self) -> None:
        # A module met after the mark (only inside a trial) has no later state: it goes back to before.
        self._write(self._after + self._before[len(self._after) :])

    def _write(self, values: list[Tensor]) -> None:
        for (part, name), tensor, value in zip(self._owners, self._tensors, values, strict=True):
            if tensor.shape == value.shape:
                with torch.no_grad():
                    tensor.copy_(value)
                value = tensor
            if part._buffers[name] is not value:
                part._buffers[name] = value


_original_backward = torch.autograd.backward
_interceptor = threading.local()


def _dispatching_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    handler = getattr(_interceptor, "handler", None)
    if handler is None:
        _original_backward(tensors, *args, **kwargs)
    else:
        handler(tensors, *args, **kwargs)


@contextmanager
def _intercept_backward(handler: Callable[..., None]) -> Iterator[None]:
    """Send this thread's ``backward()`` calls to `handler`."""
    outer, outer_handler = torch.autograd.backward, getattr(_interceptor, "handler", None)
    torch.autograd.backward = _dispatching_backward
    _interceptor.handler = handler
    try:
        yield
    finally:
        _interceptor.handler = outer_handler
        torch.autograd.backward = outer


class _Recorder:
    """What a closure did and returned: the loss, whichever way the closure is written.

    A backward is put off until the closure has returned, since an attached loss is differentiated directly (and not,
    for example, the scaled loss of a GradScaler). A second backward in one closure is gradient accumulation: then each
    runs at once, so that no more than one micro-batch's graph is alive.
    """

    def __init__(self, run: Callable[[Tensor], None] | None) -> None:
        self._run = run
        self._accumulating = False
        self.losses: list[Tensor] = []

    def backward(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        many = tuple(tensors) if isinstance(tensors, (tuple, list)) else (tensors,)
        weights = grad_tensors if isinstance(grad_tensors, (tuple, list)) else (grad_tensors,) * len(many)
        for tensor, weight in zip(many, weights, strict=True):
            loss = tensor if weight is None else (tensor * weight).sum()
            if self._run is not None and self.losses:
                if not self._accumulating:
                    self._run(self.losses[0])
                    self.losses[0] = self.losses[0].detach()
                    self._accumulating = True
                self._run(loss)
                loss = loss.detach()
            self.losses.append(loss)

    def attached(self, returned: Any) -> Tensor:
        """Return the loss with its graph."""
        if isinstance(returned, Tensor) and returned.requires_grad:
            return _scalar(returned)
        if not self.losses:
            _value(returned)
            raise ClosureError(
                f"the closure returned {_kind(returned)} and called no backward: return the loss itself, attached to "
                "its graph (no .item(), .detach() or torch.no_grad())"
            )
        return torch.stack([_scalar(loss) for loss in self.losses]).sum()

    def differentiate(self, returned: Any) -> Tensor:
        """Run what was put off, and return the detached loss."""
        assert self._run is not None
        if self._accumulating:
            return self._agreed(returned, sum(_scalar(loss).detach() for loss in self.losses))
        loss = self.attached(returned)
        self._run(loss)
        return self._agreed(returned, loss.detach())

    def value(self, returned: Any) -> Tensor | float:
        """Return the loss without its graph."""
        if returned is None and self.losses:
            return torch.stack([_scalar(loss).detach() for loss in self.losses]).sum()
        return _value(returned)

    @staticmethod
    def _agreed(returned: Any, differentiated: Any) -> Tensor:
        if returned is None or (isinstance(returned, Tensor) and returned.requires_grad):
            return differentiated  # type: ignore[no-any-return]
        value, reference = float(_value(returned)), float(differentiated)
        if abs(value - reference) > 1e-2 * max(abs(value), abs(reference)):
            raise ClosureError(
                f"the closure returned {value} but called backward on a loss of {reference}: call backward on the loss "
                "that is returned (a GradScaler's scaled loss is not it), or leave backward out"
            )
        return differentiated  # type: ignore[no-any-return]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " without a graph")
    return f"{value!r} of type {type(value).__name__}"


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or loss.is_complex():
        raise ClosureError(f"the closure returned {_kind(loss)}: return one real number, e.g. loss.mean()")
    return loss.reshape(())


def _value(returned: Any) -> Tensor | float:
    if isinstance(returned, Tensor):
        return _scalar(returned).detach()
    if isinstance(returned, (int, float)):
        return float(returned)
    raise ClosureError(f"the closure returned {_kind(returned)}: return the loss, a tensor with one element")


class Workspace:
    """What a guard keeps between steps: memory for the copies, and what it learned about the closures."""

    def __init__(self) -> None:
        self.copies: list[Tensor] = []
        self.trials_need_grad = False

    def fit(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return memory of the tensors' shapes, allocating only when they have changed."""
        same = len(self.copies) == len(tensors) and all(
            c.shape == p.shape and c.dtype == p.dtype and c.device == p.device
            for c, p in zip(self.copies, tensors, strict=True)
        )
        if not same:
            self.copies = [torch.empty_like(p, requires_grad=False) for p in tensors]
        return self.copies


class Guard:
    """Spans one step: evaluates closures here and elsewhere, and puts everything back.

    Args:
        tensors: The parameters that may move.
        workspace: Kept by the caller from step to step.

    Leaving the block by an exception puts everything back to before the block. Otherwise parameters stay where they
    were last put, and buffers and random state are as after the one evaluation that `mark` named.

    An evaluation with ``random=`` is a replay: buffers and random state are first put back to where they were before
    that sample was drawn.
    """

    def __init__(self, tensors: Sequence[Tensor], workspace: Workspace) -> None:
        self._tensors = list(tensors)
        self._workspace = workspace
        self._copies: list[Tensor] = []
        self._origin: list[Tensor] = []
        self._devices = sorted({p.device for p in tensors if p.device.type not in ("cpu", "meta")}, key=str)
        self._buffers = _Buffers()
        self._marked: RandomState | None = None

    def __enter__(self) -> Guard:
        self.entry = RandomState(self._devices)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.undo()
        elif self._marked is not None:
            self._marked.restore()
            self._buffers.to_after()

    def random_state(self) -> RandomState:
        """Return the present random state, to replay the next evaluation later."""
        return RandomState(self._devices)

    def mark(self) -> None:
        """Take the present buffers and random state as those to leave behind."""
        self._marked = RandomState(self._devices)
        self._buffers.mark()

    def undo(self) -> None:
        """Put everything back to before the block."""
        origin = self._origin or self._copies
        if origin:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors, origin)
        self.entry.restore()
        self._buffers.to_before()
        self._marked = None

    def copy(self) -> list[Tensor]:
        """Copy the parameters, once, and return the copies."""
        if not self._copies:
            self._copies = self._workspace.fit(self._tensors)
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._tensors)
        return self._copies

    def rebase(self) -> None:
        """Make the present parameters those that `put_back` returns to; `undo` still returns to the first ones."""
        self._origin = self._origin or [c.clone() for c in self.copy()]
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._tensors)

    def put_back(self) -> None:
        """Copy the parameters back."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors, self._copies)

    def gradient(
        self, closure: Closure, inputs: Sequence[Tensor], random: RandomState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss at the present point and its gradients; every ``.grad`` stays what it is.

        The backward is a true one restricted to `inputs`, so hooks (DistributedDataParallel's among them) run.
        """
        with self._gradients_aside(inputs):
            recorder = _Recorder(lambda loss: _original_backward(loss, inputs=list(inputs)))
            returned = self._call(closure, recorder, True, random)
            with torch.enable_grad():
                loss = recorder.differentiate(returned)
            return loss, [p.grad for p in inputs]

    def attached(self, closure: Closure, random: RandomState | None = None) -> Tensor:
        """Return the loss at the present point with its graph."""
        with self._gradients_aside():
            recorder = _Recorder(None)
            returned = self._call(closure, recorder, True, random)
            with torch.enable_grad():
                return recorder.attached(returned)

    def value(self, closure: Closure, random: RandomState | None = None) -> Tensor | float:
        """Return the loss at the present point (one forward)."""
        with self._gradients_aside():
            if not self._workspace.trials_need_grad:
                recorder = _Recorder(None)
                before = RandomState(self._devices)
                try:
                    return recorder.value(self._call(closure, recorder, False, random))
                except RuntimeError as error:
                    # A closure that differentiates inside (an unrolled loop) cannot run without gradients.
                    if "require grad" not in str(error):
                        raise
                    self._workspace.trials_need_grad = True
                    random = random or before
            recorder = _Recorder(None)
            return recorder.value(self._call(closure, recorder, True, random))

    @contextmanager
    def _gradients_aside(self, inputs: Sequence[Tensor] = ()) -> Iterator[None]:
        """Take every .grad away while a closure runs, so that zero_grad and backward inside it meet nothing."""
        tensors = {id(p): p for p in (*self._tensors, *inputs)}.values()
        held = [(p, p.grad) for p in tensors]
        try:
            for p in tensors:
                p.grad = None
            yield
        finally:
            for p, grad in held:
                p.grad = grad

    def _call(self, closure: Closure, recorder: _Recorder, with_grad: bool, random: RandomState | None) -> Any:
        if random is not None:
            self._buffers.to_before()
            random.restore()
        # Autocast caches casts of the parameters for as long as its outermost block lasts; ours have moved since.
        torch.clear_autocast_cache()
        with (
            self._buffers.watch(),
            _intercept_backward(recorder.backward),
            torch.enable_grad() if with_grad else torch.no_grad(),
        ):
            return closure()
