"""The Response role: the response of the lower variable to a move of the upper one.

An upper search needs phi(a) = f(x - a d, y(a)). Models of y(a):

* `Tangent`: y + a w with w = P C^T d, along the tangent of y*(x - a d). The slope of phi at 0 is exactly -s with
  s = <f_x, d> - <f_y, w>, for any P. Small steps therefore pass. A trial costs one value of f.
* `OneMoreStep` (`adaptive_bilevel.bilevel.one_step`): one more lower step at x - a d, the paper's search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from torch import Tensor

from ..errors import LowerLevelError
from ..evaluation.reductions import agree
from ..evaluation.vectors import inner
from ..hypergradient.solution import LinearSolver
from ..optim.search_path import SearchPath
from ..optim.state import RoleState
from . import kept_inverse
from .context import Change, Place, Point, Redirect
from .inverse import inverse_of
from .multilevel import MultilevelTangent
from .roles import ResponseModel
from .tangent import JointTangent, TangentModel

__all__ = ["Tangent", "Unanswered"]


def slope_ratio(slope: float, path: SearchPath) -> float:
    """Return s / <h, d>; nan where nothing is promised."""
    return slope / path.promised if path.promised else math.nan


@final
class Unanswered:
    """No response: y stays, and phi(a) = f(x - a d, y).

    Args:
        path: The path.
        slope: <f_x, d>.
    """

    comparable = True
    hessian = None
    offsets: Sequence[Tensor] | None = None

    def __init__(self, path: SearchPath, slope: float) -> None:
        self.path, self.slope, self.slope_ratio = path, slope, slope_ratio(slope, path)

    def close(self) -> None:
        """Do nothing."""

    def answer(self, step: float) -> None:
        """Do nothing."""

    def changes(self) -> list[Change]:
        """Return nothing to compare."""
        return []

    def confirm(self, place: Place) -> None:
        """Do nothing."""

    def effects(self) -> list[Change]:
        """Return nothing to compare."""
        return []

    def correction(self) -> float | None:
        """Return None."""
        return None


@final
class Tangent:
    """Response along the tangent: y(a) = y + a w with w = P C^T d.

    If d does not descend along the tangent, the hypergradient and P disagree. The solve then continues, and the path
    follows the hypergradient with the same P. If neither loss depends on the entries that move along d, the sample is
    not that of the hypergradient; the step gives a warning. Without a lower level, y stays, and f must depend on x
    directly.

    If the hypergradient has left no inverse, `Lanczos` builds one, and the next steps use it, too: see
    `adaptive_bilevel.bilevel.kept_inverse`.

    Args:
        solver: P. `Identity` and a random draw approximate the direction of a solution, but not its length. `CG`
            replaces them if d descends along its tangent.
        products: How products are computed, as for `adaptive_bilevel.hypergradient.implicit`.
    """

    def __init__(self, solver: LinearSolver, products: str = "auto") -> None:
        self.solver, self._products = solver, products

    def init(self) -> RoleState:
        """Return the state before the first step."""
        return kept_inverse.init()

    def propose(self, point: Point, path: SearchPath, redirect: Redirect, state: RoleState) -> ResponseModel:
        """Return the tangent along the path, or along that of its own hypergradient.

        Raises:
            LowerLevelError: There is no lower level, and f does not depend on x directly.
        """
        problems = point.problems()
        if not problems:
            return _direct(point, path)
        inverse = inverse_of(self.solver, kept_inverse.recall(state, self.solver, point))
        several = any(problem.answers is not None for problem in problems)
        model: TangentModel = (MultilevelTangent if several else JointTangent)(point, problems, inverse, self._products)
        model.along(path)
        model.slope_ratio = slope_ratio(model.slope, path)
        while model.slope <= 0.0 and not model.blind and model.refine():
            model.along(redirect(model.hypergradient()))
        model.close()
        return model

    def commit(self, point: Point, model: ResponseModel, state: RoleState) -> RoleState:
        """Return the state with the inverse in it that the next steps may use."""
        return kept_inverse.keep(model.inverse, state) if isinstance(model, TangentModel) else RoleState()


def _direct(point: Point, path: SearchPath) -> Unanswered:
    """Return a response in which y stays; f must depend on x directly."""
    if all(not bool(g.any()) for g in point.f_x):
        raise LowerLevelError(
            "BiSLS(lower=None): the upper loss does not depend on the upper parameters directly, so the search "
            "needs the lower level's response; pass lower= the lower optimizer. Where the upper closure runs the inner "
            "loop itself, give hypergradient='direct', and let the loop be differentiable"
        )
    return Unanswered(path, float(agree(inner(point.f_x, path.along))[0]))
