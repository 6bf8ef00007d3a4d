"""A lower level that an upper step is not told of: tensors in a direct loss that other code trains.

With ``hypergradient="direct"``, the upper loss is a function of x alone. If it is evaluated at one virtual step of a
model that goes on training (meta-weight-net, meta label correction, DARTS), or at hyper-layers that learn how to answer
to x (self-tuning networks), the parameters of the model are constants of each search. The search certifies what one
virtual step gains, but every later step starts from parameters that x has changed as well. Steps that are certified can
then be ten times longer than those that work, and x is saturated after a few of them.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, final

from torch import Tensor

from ..evaluation.graph import nodes
from ..evaluation.parts import any_in_parts
from ..evaluation.vectors import fingerprint

__all__ = ["HiddenLevel"]

_FIRST, _RECENT = 4, 8
"""How many of the first and of the last losses are compared."""

HIDDEN = (
    "the upper loss {how}, although each step lowered it on its sample, and it depends on {count} tensors besides the "
    "upper parameters that other code changes between the steps. hypergradient='direct' takes them as constants, so "
    "steps can be far longer than those which they can follow. If they are trained, they are a lower level:\n"
    "    outer = BiSLS(x, lower=inner_optimizer, hypergradient=implicit)\n"
    "    outer.step(validation_loss, training_loss)  # both at the parameters themselves, without a virtual step"
)


@final
class HiddenLevel:
    """Reports once that a direct loss has risen and depends on leaves that other code moves.

    It has risen if the median of the last 8 values is above the largest of the first 4, or if it is not finite. Leaves
    that the closure makes anew each time, and those that stay where they are, are no lower level. The graph of the loss
    is looked at in the first step only.
    """

    def __init__(self) -> None:
        self._leaves: list[weakref.ref[Tensor]] | None = None
        self._place = 0.0
        self._first = list[float]()
        self._recent = deque[float](maxlen=_RECENT)

    def look(self, loss: Any, upper: Sequence[Tensor]) -> None:
        """Record the leaves of the loss beside the upper parameters, the first time that it has a graph."""
        if self._leaves is not None or not isinstance(loss, Tensor) or loss.grad_fn is None:
            return
        known = {id(p) for p in upper}
        found = [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]
        leaves = [t for t in found if id(t) not in known]
        if any_in_parts(leaves):  # whose norm every process would have to ask for
            leaves = []
        self._leaves, self._place = [weakref.ref(t) for t in leaves], fingerprint(leaves)

    def end(self, value: float) -> list[str]:
        """Take in the loss of a step, and return the warning to give."""
        if not self._leaves:
            return []
        if not math.isfinite(value):
            return self._told("is not finite") if self._first else []
        if len(self._first) < _FIRST:
            self._first.append(value)
            return []
        self._recent.append(value)
        now = median(self._recent)
        if len(self._recent) < _RECENT or not now > max(self._first):
            return []
        return self._told(f"has risen from {self._first[0]:.4g} to {now:.4g}")

    def _told(self, how: str) -> list[str]:
        leaves = [t for reference in self._leaves or [] if (t := reference()) is not None]
        if len(leaves) < len(self._leaves or []) or fingerprint(leaves) == self._place:
            return []
        self._leaves = []
        return [HIDDEN.format(how=how, count=len(leaves))]
