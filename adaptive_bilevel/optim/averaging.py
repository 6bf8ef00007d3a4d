"""Means of the iterates: what the parameters hold where the iterates themselves are noisy.

Where samples disagree, steps that are long enough to get ahead leave each iterate z_k far from the solution, and their
mean near to it. The parameters hold that mean,

    xbar_k = xbar_{k-1} + w_n (z_k - xbar_{k-1}),        w_n = (P + 1) / (n + P),  n = 1, 2, ... since it began,

which weighs about the last n / (P + 1) iterates (Shamir and Zhang, 2013); P = 9. Gradients are taken at z. A closure
can be evaluated anywhere, so z - xbar is the optimizer's own affair, kept in its state: no train() and eval() as in
schedule-free methods, and the level above sees xbar.

The solution of a lower problem moves with the upper variable, and a mean is late. Each step therefore compares both
points on its sample: once the mean of f(xbar) - f(z) is above 0 by two standard errors, the mean begins anew at z.
Parameters that something else has moved (a cold start, a projection, a level above) begin anew, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.vectors import cast_like, fingerprint, unmoved
from .direction import Descent, Gradient
from .moments import Moment, mean
from .state import RoleState, read_states, write_states

__all__ = ["Average", "MeanGradient", "settle"]

POWER = 9.0
"""P: the mean is over about the last tenth of the iterates."""

STANDARD_ERRORS = 2.0
FEWEST = 4
"""So many comparisons at least tell that a mean is behind."""

_ENTRY = "averaging"


@final
class MeanGradient:
    """Searched along the gradient, stepped along the mean of the gradients; both are bias-corrected as Adam's.

    Args:
        beta: Decay of the mean, in [0, 1).
    """

    kind = "sgd"

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return g to search along, and its mean to step along."""
        average = mean(gradient.values, state.each, self._beta)
        step = average.moment()
        if step:
            foreach.div_(step, average.mass)
        return Descent(list, list(cast_like(step, gradient.values)), memory=average)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return the mean with this gradient in it."""
        average: Moment = descent.memory
        return average.commit(moved)


class Average(NamedTuple):
    """The mean of the iterates before a step.

    Attributes:
        ahead: z - xbar.
        taken: n, the number of iterates in it.
        lead: Decaying mean of f(xbar) - f(z).
        variance: Its decaying variance.
    """

    ahead: list[Tensor]
    taken: int = 0
    lead: float = 0.0
    variance: float = 0.0

    @classmethod
    def read(cls, state: Any, params: Sequence[Tensor]) -> Average | None:
        """Return what the state holds; None if that is nothing, or if other code has moved the parameters since.

        Args:
            state: The optimizer's.
            params: Its parameters.
        """
        kept = read_states(state, {_ENTRY: RoleState()}, params)[_ENTRY]
        if "at" not in kept.shared or not all("ahead" in own for own in kept.each):
            return None
        if not unmoved(kept.shared["at"], params):
            return None
        counts = (kept.shared[name] for name in ("count", "lead", "variance"))
        pairs = zip(params, kept.each, strict=True)  # what was frozen meanwhile stays where it is
        return cls([own["ahead"] if p.requires_grad else torch.zeros_like(p) for p, own in pairs], *counts)

    def without_last(self, mean: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean before the last iterate; the mean itself if there is no other iterate in it."""
        weight = _weight(self.taken)
        if weight == 1.0:
            return list(mean)
        return foreach.add(list(mean), self.ahead, alpha=-weight / (1.0 - weight))

    def compared(self, lead: float) -> Average | None:
        """Return it with f(xbar) - f(z) on this sample taken in; None if the mean is behind, and begins anew."""
        if not math.isfinite(lead):
            return self
        weight = _weight(self.taken)
        off = lead - self.lead
        after = self._replace(
            lead=self.lead + weight * off, variance=(1.0 - weight) * (self.variance + weight * off * off)
        )
        spread = (POWER + 1.0) ** 2 / (2.0 * POWER + 1.0) / (self.taken + 1.0)
        behind = after.lead > STANDARD_ERRORS * math.sqrt(after.variance * spread)
        return None if behind and self.taken >= FEWEST else after


def settle(state: Any, params: Sequence[Tensor], start: Sequence[Tensor], average: Average | None) -> None:
    """Leave the mean in the parameters, which are at the new iterate, and keep how far that is ahead.

    Args:
        state: The optimizer's.
        params: Its parameters.
        start: The iterate before the step.
        average: The mean before the step; None: it begins with the new iterate.
    """
    if average is None:
        ahead, average = [torch.zeros_like(p, requires_grad=False) for p in params], Average([])
    else:
        ahead = foreach.sub(params, start)
        foreach.add_(ahead, average.ahead)
        foreach.mul_(ahead, 1.0 - _weight(average.taken + 1))
        foreach.sub_(params, ahead)
    shared = {
        "at": fingerprint(params),
        "count": average.taken + 1,
        "lead": average.lead,
        "variance": average.variance,
    }
    write_states(state, {_ENTRY: RoleState(shared, [{"ahead": a} for a in ahead])}, params)


def _weight(count: int) -> float:
    """Return the weight of the newest of `count` iterates."""
    return (POWER + 1.0) / (max(count, 1) + POWER)
