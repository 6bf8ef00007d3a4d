"""How long an upper step may be once steps of x have made the lower problem stiff.

`Lanczos` resolves curvatures of the lower Hessian down to 1 / tau = max |t| / k^2, t being its Ritz values. Let l be
the least max |t| of the steps so far. Where tau l < 1, the direction that was the steepest one then is flat now:
neither the response nor a lower loop, whose steps are at most about 2 / max |t|, follows x in it any more. f(x, y)
then hardly depends on x, no trial is rejected, and steps that grow lead x ever further: to penalties of some entries
of y without end, or to ever larger features below a linear layer. So

    a  <=  n length tau l        while tau l < 1,

where length is that of the step before tau l fell below 1, and n = 1, 2, ... counts the steps since then. So the limit
fades where the lower loss has become steep once and stays so. Nothing is evaluated for it.

``docs/decisions/stiffness.md`` has what was measured: of 18 tasks, max |t| grows by at most 12 times on all but those
with logarithms of penalties (600 to 80,000 times) and few-shot learning (1e14 and more).
"""

from __future__ import annotations

import math

from ..hypergradient.solution import HessianReport
from ..optim.state import RoleState

__all__ = ["init", "limit", "seen"]


def init() -> RoleState:
    """Return the state before the first step.

    It has "least" (l; 0 before it is known), "part" (min{1, tau l} of the last step), "length", and "count" (n).
    """
    return RoleState({"least": 0.0, "part": 1.0, "length": 0.0, "count": 0})


def seen(state: RoleState, hessian: HessianReport | None, previous: float) -> RoleState:
    """Return the state with the lower Hessian of a step in it.

    Args:
        state: See `init`.
        hessian: What the step has seen of it; None, or a solve that shows no Ritz values: the state stays as it is.
        previous: Length of the last step; 0 if there was none.

    >>> from adaptive_bilevel.hypergradient.solution import SolverStatus
    >>> reports = [HessianReport(SolverStatus.complete, 0.1, 1.0, t, horizon=100.0 / t) for t in (2.0, 800.0)]
    >>> state = seen(init(), reports[0], 0.0)
    >>> limit(state), limit(seen(state, reports[1], 3.0))
    (inf, 0.75)
    """
    norm = math.nan if hessian is None else hessian.norm
    if hessian is None or not (0.0 < norm < math.inf and hessian.horizon > 0.0):
        return state
    known = state.shared["least"]
    least = min(known, norm) if known > 0.0 else norm
    now = min(1.0, hessian.horizon * least)
    count = state.shared["count"] + 1 if now < 1.0 else 0
    return RoleState(
        {"least": least, "part": now, "length": previous if count == 1 else state.shared["length"], "count": count}
    )


def limit(state: RoleState) -> float:
    """Return the length that no step may exceed; infinite where there is no such limit."""
    length, count = state.shared["length"], state.shared["count"]
    return float(count * length * state.shared["part"]) if count and length > 0.0 else math.inf
