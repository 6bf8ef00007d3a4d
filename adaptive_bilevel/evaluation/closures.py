"""How a closure may be written, and what it says of its loss: the value, the loss's gradient, and ``.grad``.

A closure may call backward or not, once or once per micro-batch, and zero_grad before; it may return the loss, its
value, or (after a backward) nothing. A backward of its own leaves its gradient in ``.grad``, where the closure may read
and change it (clipping, masks, noise): what is there when it returns is what a step goes along, as with every optimizer
of torch, and the slope along it is that of the loss itself, whose gradient is kept beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ClosureError
from . import processes
from .all_leaves import to_all_leaves
from .buffers import Buffers
from .interception import Watched, installed
from .parts import part
from .replicated import Replicated

__all__ = ["Closure", "Differentiated", "attached", "differentiated", "require_closure", "value", "value_of"]

Closure = Callable[[], Any]
"""A zero-argument function returning the loss; with or without zero_grad and backward inside."""

StandIns = Callable[[], Sequence[tuple[Tensor, Tensor | None]]]
"""Returns tensors with a gradient (None: zeros) for their ``.grad`` where none is computed."""

_LINEAR = frozenset(
    f"{name}Backward0"
    for name in (
        "Mul",
        "Div",
        "Neg",
        "ToCopy",
        "Sum",
        "View",
        "ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Clone",
        "Select",
    )
)
"""Operations that make a multiple of one scalar, if they have one input with a graph."""


class Differentiated(NamedTuple):
    """What a closure left when it returned.

    Attributes:
        loss: The loss, detached.
        gradients: ``.grad`` of each tensor that was asked for; None where there is none.
        own: The loss's own gradients, where those are others; None: they are the same.
        looked: Whether the closure called backward, so that it may have looked at ``.grad``.
    """

    loss: Tensor
    gradients: list[Tensor | None]
    own: list[Tensor | None] | None = None
    looked: bool = False


class Recorder:
    """What a closure did and returned: the loss, whichever way the closure is written.

    A backward of the closure's runs at once. Without one, the loss is differentiated when it is returned.

    Args:
        inputs: What to differentiate by, into ``.grad``; None: nothing is differentiated.
        stand_ins: Without `inputs`: what a closure finds after a backward, to read and change to no effect.
        of: The modules that run.
    """

    def __init__(self, inputs: list[Tensor] | None, stand_ins: StandIns = tuple, of: Replicated | None = None) -> None:
        self._inputs, self._stand_ins, self._replicated = inputs, stand_ins, of or Replicated()
        self._losses: list[Tensor] = []  # of the backwards that ran, in parts; without inputs, with their graphs
        self._root: Any = None  # of the graph of the first of them
        self._own: list[Tensor | None] | None = None  # None: no backward of the closure's ran
        self._hides = False
        self._scaled: list[tuple[Tensor, Tensor]] = []

    def hide(self) -> None:
        """Record that a part of the graph (a reentrant checkpoint) hides which tensors are in it."""
        self._hides = True

    def scaled(self, outputs: Any, found: Any) -> None:
        """Record that a GradScaler has multiplied a loss."""
        if isinstance(outputs, Tensor) and found is not outputs:  # a scaler that is not enabled returns what it got
            self._scaled.append((outputs, found))

    def backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        """Take a backward call of the closure."""
        many = tuple(tensors) if isinstance(tensors, (tuple, list)) else (tensors,)
        weights = tuple(grad_tensors) if isinstance(grad_tensors, (tuple, list)) else (grad_tensors,) * len(many)
        loss = _total([_scalar(t if w is None else (t * w).sum()) for t, w in zip(many, weights, strict=True)])
        if self._inputs is None:
            self._losses.append(loss)
            for p, g in self._stand_ins():
                p.grad = torch.zeros_like(p) if g is None else g.clone()
            return
        processes.ready()
        asked = None if inputs is None else {id(p) for p in ((inputs,) if isinstance(inputs, Tensor) else inputs)}
        self._root = loss.grad_fn if not self._losses else None
        before = None
        if self._own is not None and not self._untouched():
            before = [None if p.grad is None else p.grad.detach().clone() for p in self._inputs]
        self._run(loss, [p for p in self._inputs if asked is None or id(p) in asked], retain_graph, create_graph)
        after = [None if p.grad is None else p.grad.detach().clone() for p in self._inputs]
        if before is not None and self._own is not None:
            after = [_added(*parts) for parts in zip(self._own, before, after, strict=True)]
        self._own = after

    def _run(
        self, loss: Tensor, inputs: list[Tensor], retain_graph: bool | None = None, create_graph: bool = False
    ) -> None:
        if inputs:  # an empty list would mean all leaves
            with Watched(None, None, True), self._replicated.exchanging():  # checkpointing runs modules again
                written = self._replicated.parts()
                if self._hides or written:
                    to_all_leaves(loss, inputs, written, retain_graph, create_graph)
                else:
                    installed.backward(loss, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
        self._losses.append(loss.detach())

    def _untouched(self) -> bool:
        """Return whether ``.grad`` is what the backwards have left there."""
        assert self._own is not None and self._inputs is not None
        pairs = zip(self._inputs, self._own, strict=True)
        return all(p.grad is g if p.grad is None or g is None else torch.equal(part(p.grad), part(g)) for p, g in pairs)

    def attached(self, returned: Any) -> Tensor:
        """Return the loss with its graph."""
        self._refuse_scaled(returned)
        if isinstance(returned, Tensor) and returned.requires_grad:
            return _scalar(returned)
        if not self._losses:
            value_of(returned)
            raise ClosureError(
                f"the closure returned {_kind(returned)} and called no backward: return the loss itself, attached to "
                "its graph (no .item(), .detach() or torch.no_grad())"
            )
        return _total(self._losses)

    def differentiable(self, returned: Any) -> Any:
        """Return a loss, or raise what `differentiated` would raise before its backward."""
        return returned if self._own is not None else self.attached(returned)

    def differentiated(self, returned: Any) -> Differentiated:
        """Differentiate a loss on which no backward was called, and return what the closure left."""
        assert self._inputs is not None
        self._refuse_scaled(returned)
        if self._own is None:
            loss = self.attached(returned)
            self._run(loss, self._inputs)
            return Differentiated(loss.detach(), [p.grad for p in self._inputs])
        loss, own, left = _total(self._losses), self._own, [p.grad for p in self._inputs]
        untouched = self._untouched()
        node = returned.grad_fn if isinstance(returned, Tensor) and returned.numel() == 1 else None
        if node is not None and node is not self._root and _is_multiple(node, self._root):
            # A GradScaler's scaled loss, or one divided by a number of batches.
            returned = returned.detach().reshape(())
            scale = float(returned / loss) if bool(loss.isfinite()) and bool(loss != 0) else math.nan
            own, loss = [None if g is None else g * scale for g in own], returned
            left, untouched = (own, True) if untouched else (left, False)
        elif returned is not None and (node is None or node is not self._root):
            _compare(value_of(returned), loss)
        return Differentiated(loss, left, None if untouched else own, True)

    def value(self, returned: Any) -> Tensor | float:
        """Return the loss without its graph."""
        self._refuse_scaled(returned)
        if returned is None and self._losses:
            return _total([loss.detach() for loss in self._losses])
        return value_of(returned)

    def _refuse_scaled(self, returned: Any) -> None:
        """Reject the loss of a GradScaler: whatever else there is (bounds, the hypergradient) is not multiplied."""
        for before, after in self._scaled:
            if isinstance(returned, Tensor):
                same = returned is after or returned.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
            else:
                same = returned is None or float(before.detach()) != float(after.detach()) == returned
            if same:
                raise ClosureError(
                    "the closure returned the scaled loss of a GradScaler: return the loss itself, attached to its "
                    "graph. The backward may be that of the scaled loss: scaler.scale(loss).backward(); return loss"
                )


def differentiated(closure: Closure, inputs: list[Tensor], buffers: Buffers, asks: bool) -> Differentiated:
    """Call the closure, differentiate its loss into ``.grad`` of the inputs, and return what it left.

    With `asks`, no process begins the backward, which may be one of all processes, where one has failed.
    """
    recorder = Recorder(inputs, of=buffers.replicated)
    with Watched(recorder, buffers, True):
        returned = processes.together(lambda: recorder.differentiable(closure())) if asks else closure()
        return recorder.differentiated(returned)


def attached(closure: Closure, buffers: Buffers, stand_ins: StandIns) -> Tensor:
    """Call the closure, and return its loss with its graph."""
    recorder = Recorder(None, stand_ins)
    with Watched(recorder, buffers, True):
        return recorder.attached(closure())


def value(closure: Closure, buffers: Buffers, stand_ins: StandIns, *, with_grad: bool = False) -> Tensor | float:
    """Call the closure, and return its loss without a graph."""
    recorder = Recorder(None, stand_ins)
    with Watched(recorder, buffers, with_grad):
        return recorder.value(closure())


def _added(own: Tensor | None, before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Return the loss's own gradient with what a backward has added to ``.grad``."""
    if after is None:
        return own
    fresh = after if before is None else after - before
    return fresh if own is None else own + fresh


def _is_multiple(one: Any, other: Any) -> bool:
    """Return whether one node of a graph is a multiple of the other, as the graph itself shows."""
    lines = []
    for node in (one, other):
        line = [node]
        while node is not None and node.name() in _LINEAR:
            inputs = [found for found, _ in node.next_functions if found is not None]
            if len(inputs) != 1:
                break
            (node,) = inputs
            line.append(node)
        lines.append(line)
    return any(a is b for a in lines[0] for b in lines[1] if a is not None)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _compare(returned: Tensor | float, differentiated: Tensor) -> None:
    """Reject a closure whose backward was not that of the value it returned."""
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
            "e.g. optimizer.step(lambda: loss_fn(model(x), y)). In a trainer whose own loop calls step(), write\n"
            "    optimizer.host = self\n    def step(self, optimizer): return optimizer.advance(closure)"
        )
    return closure  # type: ignore[no-any-return]
