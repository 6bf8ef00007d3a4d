"""The ModelCheck role: how far does a tangent hold?

The searched function phi(a) = f(x - a d, y + a w) takes the lower solution to be on its tangent. How wrong that is at
a candidate shows in the lower gradient, which should not change: delta = grad_y g(x - a d, y + a w) - grad_y g(x, y).

* `CurvatureCheck` compares how large the change is, and whether a shorter step would mend it.
* Where the response knows its adjoint, it also asks what a change that is too large means for f. The lower solution is
  at y + a w - H^{-1} delta, so F(x - a d) is phi(a) - <v, delta>, v = H^{-1} f_y, up to terms of second order in
  H^{-1} delta; where that passes the test of decrease too, the change does no harm. (The dual-weighted residual of
  Becker and Rannacher, the adjoint correction of Pierce and Giles.)

The first alone is blind to what a change is good for: in hyper-representation on minibatches with CG 10, most of it is
in directions that f hardly depends on and that the lower steps mend at once, and half of the steps were cut for it. The
second alone ends steps at 1e-6 where v cannot be had: the kinks of a ReLU network as lower variable (iMAML, CG 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

from ..optim.state import RoleState
from .context import Change, Place, Point
from .roles import ModelCheck, ResponseModel, StepCheck
from .sample_support import Support, support

__all__ = ["CurvatureCheck", "NoCheck", "TangentCheck", "check_of"]


@final
class NoCheck:
    """Every candidate that passed the test of decrease is taken."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, point: Point, state: RoleState) -> StepCheck:
        """Return a check that passes everything."""
        return self

    def __call__(self, step: float, surplus: float, model: ResponseModel, place: Place) -> bool:
        """Return True."""
        return True

    def commit(self, point: Point, check: StepCheck, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class CurvatureCheck:
    """A candidate is rejected if the lower gradient has changed by more than tolerance (step ||C^T d|| + ||grad_y g||).

    See `TangentCheck`. On a sample that supports only a share of x, the tolerance of the first term is divided by
    that share (see `adaptive_bilevel.bilevel.sample_support`, whose counts are the state).

    Args:
        tolerance: > 0.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, point: Point, state: RoleState) -> StepCheck:
        """Return the check for this sample."""
        if not point.lower:
            return NoCheck()
        found = support(point.moving, state.shared)
        return TangentCheck(self._tolerance / found.share, point.scale.resumed, found, self._tolerance)

    def commit(self, point: Point, check: StepCheck, state: RoleState) -> RoleState:
        """Return the entries with those of this sample."""
        found = check.support if isinstance(check, TangentCheck) else None
        return RoleState() if found is None else RoleState(found.after(point.moving, state.shared))


@final
class TangentCheck:
    """Whether a tangent holds at a step: what its linear model ignores must be small.

    Along the exact tangent the lower gradient does not change to first order, so a change below (tolerance + residual)
    * step * ||C^T d|| passes. So does one in a resumed search, if f, corrected for it, still decreases enough. Others
    are excused in two cases:

    * It is below the first limit plus unsolved * ||grad_y g||. Where the lower problem is not solved, the model is no
      better than that at (x, y) itself, and the lower steps that follow deal with both. (Without it, the kinks of a few
      samples in an unsolved ReLU network cut a first search to steps of 1e-5.)
    * It is half as large or larger at half of the step. What a smooth lower loss adds is of second order: there it is a
      quarter, and the search goes on to shorter steps. Otherwise no shorter step holds any better: samples cross kinks
      of a ReLU network, by which its gradient jumps, and rejected for them, steps would shrink until not one sample
      crosses a kink any more.

    A wrong effect of x itself is never excused: in log space, or behind a sigmoid, a long step has less and less
    effect. (Without this, first steps of 9 passed in the logarithm of a weight decay, after which x
    had no effect any more.) It is measured where y does not move, as the part along C^T d of
    grad_y g(x - step d, y) - grad_y g(x, y) + step C^T d, if that part of the change itself is above the first limit.
    A candidate where it is above tolerance * step * ||C^T d|| is rejected, unless the whole difference is larger than
    step * ||C^T d||, and half as large or larger at half of the step: then x makes samples cross kinks.

    A change that is not finite never passes.

    A change that is as large as without any answer of y says that the model does not reach the candidate: it is never
    excused for what a correction of first order makes of it. (In iMAML, query accuracy fell from .69 to .56 by one such
    step.) A bounded gradient also stops changing far out, where it saturates; so such a change does not pass at all
    until a candidate was rejected for what a shorter step would mend; unless the solve itself has left as much, so that
    no shorter step would change less.

    Args:
        tolerance: As above.
        resumed: Whether the search starts from a step that was accepted before. If not, f is not corrected: how far a
            linear model reaches is not known.
        found: Of the sample.
        unsolved: As above.

    Attributes:
        tolerance: As above.
        support: Of the sample.
        excused: Whether the last candidate passed by an excuse.
    """

    excused = False

    def __init__(self, tolerance: float, resumed: bool, found: Support | None = None, unsolved: float = 0.0) -> None:
        self._unsolved = unsolved
        self.tolerance, self._resumed, self._inside, self.support = tolerance, resumed, resumed, found

    def __call__(self, step: float, surplus: float, model: ResponseModel, place: Place) -> bool:
        """Return whether the tangent holds at the candidate in place; another may be there afterwards.

        Args:
            step: The step of the candidate.
            surplus: How far its value is below what the search asks for.
            model: The response, which measures changes at the candidate in place.
            place: Puts the candidate of another step there.
        """
        self.excused = False
        changes = _measured(model.changes())
        if not all(math.isfinite(c.size) for c in changes):
            self._inside = True
            return False
        limits = [(self.tolerance + c.residual) * step * c.push + c.rounding for c in changes]
        if all(c.size <= limit for c, limit in zip(changes, limits, strict=True)):
            return True
        followed = all(c.residual >= 1.0 or c.size <= (1.0 + c.residual) * step * c.push + c.rounding for c in changes)
        if self._resumed and followed and _harmless(model, surplus):
            return True
        model.confirm(place)
        near = all(c.along <= limit for c, limit in zip(changes, limits, strict=True))
        if not (near or self._effective(step, model, place)):
            self._inside = True
            return False
        self.excused = True
        limits = [limit + self._unsolved * c.before for c, limit in zip(changes, limits, strict=True)]
        if all(c.size <= limit for c, limit in zip(changes, limits, strict=True)):
            return True
        place(0.5 * step)
        for c, half, limit in zip(changes, _measured(model.changes()), limits, strict=True):
            if not (c.size <= limit or _no_smaller(c, half)):
                self._inside = True
                return False
        return self._inside or followed

    def _effective(self, step: float, model: ResponseModel, place: Place) -> bool:
        """Return whether x has the effect that the linear model says."""
        effects = _measured(model.effects())
        over = [e for e in effects if not e.along <= self.tolerance * step * e.push + e.rounding]
        if not over:
            return True
        if any(e.size <= step * e.push for e in over):
            return False
        place(0.5 * step)
        halves = _measured(model.effects())
        place(step)
        return all(_no_smaller(e, half) for e, half in zip(effects, halves, strict=True) if e in over)


def _no_smaller(change: Change, half: Change) -> bool:
    """Return whether the change at half of the step is half as large at least."""
    return 0.5 * change.size <= half.size < math.inf


def _measured(changes: Sequence[Change]) -> list[Change]:
    return [change for change in changes if change.push != 0.0]


def _harmless(model: ResponseModel, surplus: float) -> bool:
    correction = model.correction()
    return correction is not None and correction <= surplus


def check_of(option: Any) -> ModelCheck:
    """Return the role that the option ``curvature`` names, or the user's own."""
    if isinstance(option, (int, float)):
        return NoCheck() if math.isinf(option) else CurvatureCheck(float(option))
    role: ModelCheck = option
    return role
