"""Changes of x and y between two upper steps that make the upper search pointless.

* Other code moves x, for example a clamp after each step. The step that was taken then is not the searched one.
* Another optimizer steps y: the inner optimizer was made anew, and the upper one is still bound to the old one.
* Other code steps a y that was not given to the upper step, see `adaptive_bilevel.bilevel.hidden_level`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..evaluation.vectors import inner
from ..optim.base import AdaptiveOptimizer
from .hidden_level import HiddenLevel
from .lower import Lower, LowerLevel

__all__ = ["PROJECT", "BetweenSteps"]

_TIMES = 2
"""Once may be a new start, or a checkpoint; in so many steps in a row it is a habit."""

PROJECT = "pass project= (Box(low, high), Ball, Simplex or a callable)"
"""How a constraint of x is given; a host may have another way, ``host.constraint``."""

MOVED = (
    "something else than this optimizer has moved its parameters since the last step, in {times} steps in a row, so "
    "what the search has certified is not where they are. If they are clamped or normalized, {remedy}, and every trial "
    "obeys it; what else changes them (a weight decay, say) belongs into the upper loss"
)
REPLACED = (
    "the lower optimizer that this one is bound to takes no steps any more, but its parameters move: it was made anew, "
    "and the search still follows the last sample of the old one. Call bind(the new lower optimizer) on this optimizer "
    "when the lower one is made, or keep the lower optimizer"
)


@final
class BetweenSteps:
    """Looks at x and y where an upper step begins, and compares with where the last one ended.

    Attributes:
        hidden: What is known of a lower level that was not given to the step.
    """

    def __init__(self) -> None:
        self._upper: tuple[list[int], Tensor] | None = None
        self._moved: Tensor | None = None
        self._lower: tuple[int, int] | None = None
        self._times = {"moved": 0, "replaced": 0}
        self.hidden = HiddenLevel()

    def forget(self) -> None:
        """Compare the next step with nothing: the parameters were moved by those who may."""
        self._upper, self._lower = None, None

    @property
    def elsewhere(self) -> bool:
        """Whether x is not where the last step has left it, as far as that is known. Waits for the device."""
        return self._moved is not None and bool(self._moved)

    def begin(self, upper: Sequence[Tensor], lower: Lower | None) -> None:
        """Look where a step begins; on an accelerator, nothing is waited for.

        Args:
            upper: The upper parameters.
            lower: The lower level; None: its sample is given to the step.
        """
        self._moved = None
        if self._upper is not None and self._upper[0] == [id(p) for p in upper]:
            self._moved = self._upper[1] != _place(upper)
        now, before = _steps_and_versions(lower), self._lower
        replaced = now is not None and before is not None and now[0] == before[0] and now[1] != before[1]
        self._times["replaced"] = self._times["replaced"] + 1 if replaced else 0

    def end(self, upper: Sequence[Tensor], lower: Lower | None, remedy: str | None, value: float) -> list[str]:
        """Record where the step has ended, and return the warning to give.

        Args:
            upper: The upper parameters.
            lower: As in `begin`.
            remedy: How a constraint of x is given; None: there is one, so that x is moved by those who may.
            value: The upper loss where the step began.
        """
        moved = remedy is not None and self.elsewhere
        self._times["moved"] = self._times["moved"] + 1 if moved else 0
        self._upper = ([id(p) for p in upper], _place(upper))
        self._lower, self._moved = _steps_and_versions(lower), None
        said = [MOVED.format(times=_TIMES, remedy=remedy)] if self._times["moved"] == _TIMES else []
        return said + [REPLACED] * (self._times["replaced"] == _TIMES) + self.hidden.end(value, upper)


def _place(tensors: Sequence[Tensor]) -> Tensor:
    """Return ||x||^2, which tells of nearly every move, in whatever way it was made."""
    detached = [p.detach() for p in tensors]
    return inner(detached, detached) if detached else torch.zeros(())


def _steps_and_versions(lower: Lower | None) -> tuple[int, int] | None:
    """Return how often the lower losses were evaluated by their optimizers, and how often y was written to."""
    optimizers = lower.optimizers if isinstance(lower, LowerLevel) else []
    if not optimizers or not all(isinstance(o, AdaptiveOptimizer) for o in optimizers):
        return None
    counts = [o.evaluations for o in optimizers if isinstance(o, AdaptiveOptimizer)]
    evaluated = sum(c.lower.gradients + c.lower.values + c.upper.gradients + c.upper.values for c in counts)
    return evaluated, sum(p._version for p in lower.tensors()) if lower is not None else 0
