"""Whether the upper loss still falls along the last searched step, by the present hypergradient."""

from __future__ import annotations

from ..evaluation import foreach
from ..evaluation.reductions import agree
from ..evaluation.vectors import inner
from ..optim.direction import Gradient
from ..optim.state import RoleState

__all__ = ["FROM", "departed", "onward"]

FROM = "from"
"""Name of x before the step."""


def onward(gradient: Gradient, state: RoleState) -> float | None:
    """Return <h, x_j - x>, x_j being where the last searched step began; None before there was one.

    To first order, f falls by that much along a further step of the same length. Where h is of another sample than the
    step, its expected value is that of the whole: the step was not chosen by this sample.
    """
    known = [
        (p, h, own[FROM])
        for p, h, own in zip(gradient.tensors, gradient.values, state.each, strict=True)
        if FROM in own
    ]
    if not known:
        return None
    back = foreach.sub([start for _, _, start in known], [p.detach() for p, _, _ in known])
    return float(agree(inner([h for _, h, _ in known], list(back)))[0])


def departed(gradient: Gradient) -> RoleState:
    """Return what is kept of a step that begins here: per parameter "from", a copy of it."""
    before = [p.detach().clone() for p in gradient.tensors]
    return RoleState(deferred={FROM: lambda: before})
