"""A lower level that was not given to the upper step: tensors in a direct loss that other code trains.

With ``hypergradient="direct"``, the upper loss is a function of x alone. It may be evaluated at one virtual step of a
model that goes on training (meta-weight-net, meta label correction, DARTS), or at layers that predict the best
parameters for x (self-tuning networks). The parameters of the model are then constants of each search. The search tests
one virtual step only, but every later step starts from parameters that x has changed as well. Accepted steps can then
be ten times longer than those that work, and x is saturated after a few of them.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..evaluation.graph import nodes
from ..evaluation.parts import any_in_parts
from ..evaluation.vectors import fingerprint

__all__ = ["HiddenLevel"]

_FIRST, _RECENT = 4, 8
"""How many of the first and of the last losses are compared."""

HIDDEN = (
    "the upper loss {how}, and it depends on {count} tensor(s) besides the upper parameters that other code changes "
    "between the steps. hypergradient='direct' takes them as constants, so accepted steps can be far too long. If they "
    "are trained, they are a lower level:\n"
    "    from adaptive_bilevel.hypergradient import implicit\n"
    "    outer = BiSLS(x, lower=inner_optimizer, hypergradient=implicit)\n"
    "    outer.step(validation_loss, training_loss)  # both at the parameters themselves, without a virtual step\n"
    "If each inner loop starts from them on purpose, start with a smaller lr"
)


class _Leaf(NamedTuple):
    tensor: weakref.ref[Tensor]
    place: float

    def moved(self, upper: set[int]) -> bool:
        """Return whether the tensor still exists, is no upper parameter, and has changed."""
        tensor = self.tensor()
        if tensor is None or id(tensor) in upper or not _readable(tensor):
            return False
        return fingerprint([tensor]) != self.place


@final
class HiddenLevel:
    """Reports once that a direct loss has risen and depends on leaves that other code moves.

    It has risen if the median of the last 8 values is above the largest of the first 4, or if it is not finite. Leaves
    that the closure makes anew each time, and those that stay where they are, are no lower level. The graph of the loss
    is looked at in the first step only, and the leaves are read again after 1, 2, 4, ... steps with a risen loss.
    """

    def __init__(self) -> None:
        self._leaves: list[_Leaf] | None = None
        self._first = list[float]()
        self._recent = deque[float](maxlen=_RECENT)
        self._risen = 0
        self._direct = False

    def look(self, loss: Any, upper: Sequence[Tensor]) -> None:
        """Record the leaves of the loss beside the upper parameters, the first time that it has a graph."""
        self._direct = True
        if self._leaves is not None or not isinstance(loss, Tensor) or loss.grad_fn is None:
            return
        known = {id(p) for p in upper}
        found = [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]
        own = [t for t in found if id(t) not in known and _readable(t)]
        self._leaves = [_Leaf(weakref.ref(t), fingerprint([t])) for t in own]

    def end(self, value: float, upper: Sequence[Tensor]) -> list[str]:
        """Take in the loss of a step, if that was a direct one, and return the warning to give."""
        how = self._risen_by(value) if self._leaves and self._direct else ""
        self._direct = False
        self._risen += bool(how)
        if not how or self._risen & (self._risen - 1):
            return []
        own = {id(p) for p in upper}
        count = sum(leaf.moved(own) for leaf in self._leaves or [])
        if not count:
            return []
        self._leaves = []
        return [HIDDEN.format(how=how, count=count)]

    def _risen_by(self, value: float) -> str:
        """Return what is said of the loss; nothing if it has not risen."""
        if not math.isfinite(value):
            return "is not finite" if self._first else ""
        if len(self._first) < _FIRST:
            self._first.append(value)
            return ""
        self._recent.append(value)
        now = median(self._recent)
        if len(self._recent) < _RECENT or not now > max(self._first):
            return ""
        return f"has risen from {self._first[0]:.4g} to {now:.4g}"


def _readable(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers in this process that can be summed; gathered parts may have been freed."""
    plain = tensor.layout is torch.strided and not tensor.is_nested and tensor.is_floating_point()
    if not plain or tensor.device.type == "meta" or any_in_parts([tensor]):
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().size() > 0
