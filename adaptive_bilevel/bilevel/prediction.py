"""The Prediction role: does y move along with x, to where the response predicts its solution?

| ``carry=`` | class | y |
|---|---|---|
| False | `Never` | stays |
| True | `Always` | moves by the step times its response |
| "auto" | `Offered` | moves likewise; the next lower step may go back, see `AdaptiveOptimizer.offer` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from ..evaluation import foreach
from ..evaluation.parts import scattered
from ..optim.state import RoleState
from .context import PredictionContext
from .roles import Prediction

__all__ = ["Always", "Never", "Offered", "prediction_of"]


@final
class Never:
    """y stays where it is."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, context: PredictionContext, state: RoleState) -> list[Tensor] | None:
        """Return None."""
        return None

    def deliver(self, context: PredictionContext, response: Sequence[Tensor], step: float) -> None:
        """Do nothing."""

    def commit(self, context: PredictionContext, response: Sequence[Tensor] | None, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class Always:
    """y moves along.

    Where the length of the step was kept, there is no tangent of its own. The last one, of another direction, takes its
    place, in units of the lengths of the directions: w_s sqrt(<h, d> / <h, d>_s).

    The state holds "mean", the mean of the tangents, and "count", the number of them in it; and "last", the last
    tangent, with "promised", its <h, d>_s.
    """

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, context: PredictionContext, state: RoleState) -> list[Tensor] | None:
        """Return the response along what is stepped along."""
        return _mixed(context, state)

    def deliver(self, context: PredictionContext, response: Sequence[Tensor], step: float) -> None:
        """Move y by step * response."""
        context.lower.carry(response, step)

    def commit(self, context: PredictionContext, response: Sequence[Tensor] | None, state: RoleState) -> RoleState:
        """Return the mean with this tangent in it."""
        return _averaged(context, state)


@final
class Offered:
    """y moves along, and the next lower step goes back where that is better. The state is that of `Always`."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, context: PredictionContext, state: RoleState) -> list[Tensor] | None:
        """Return the response along what is stepped along; None where no lower optimizer can go back."""
        return _mixed(context, state) if context.lower.follows else None

    def deliver(self, context: PredictionContext, response: Sequence[Tensor], step: float) -> None:
        """Move y by step * response, and offer the point before."""
        context.lower.follow(response, step)

    def commit(self, context: PredictionContext, response: Sequence[Tensor] | None, state: RoleState) -> RoleState:
        """Return the mean with this tangent in it."""
        return RoleState() if response is None else _averaged(context, state)


def _mixed(context: PredictionContext, state: RoleState) -> list[Tensor] | None:
    """Return how y answers to one unit of a step along a mixture of the searched direction and the mean of the h.

    Along the mean of the hypergradients the answer is the mean of the tangents, averaged likewise. A solve for the mean
    itself would cost as much as the tangent; the mean of the solves so far is free, and differs by how H, C and A
    changed meanwhile. Measured on random quadratics (Adam, T = 1, mu = .01, momentum=True): median gap 2.7e-3, against
    4.9e-2 with the tangent of the searched direction.
    """
    tangent = _tangent(context, state)
    if tangent is None or not context.mix.averages:
        return tangent
    mean = _TangentMean(context, state, tangent)
    corrected = mean.compute()
    foreach.div_(corrected, 1.0 - context.beta**mean.count)
    return foreach.lerp(tangent, corrected, context.mix.weight)


def _tangent(context: PredictionContext, state: RoleState) -> list[Tensor] | None:
    """Return the tangent of this step, or the last one in its place; None if there is none."""
    if context.offsets is not None:
        return list(context.offsets)
    last, tensors = state.shared.get("last", ()), context.lower.tensors()
    if [w.shape for w in last] != [y.shape for y in tensors] or not last:
        return None
    last = list(map(scattered, last, tensors))  # a checkpoint that was read whole has whole ones
    return foreach.mul(last, math.sqrt(context.promised / state.shared["promised"]))


def _averaged(context: PredictionContext, state: RoleState) -> RoleState:
    """Return the tangent, and the mean with it in it, which is computed when it is written."""
    if context.offsets is None:
        return RoleState()
    news: dict[str, Any] = {}
    if context.keeps:
        news = {"last": list(context.offsets), "promised": context.promised}
    if not context.mix.averages:
        return RoleState(news)
    mean = _TangentMean(context, state, context.offsets)
    return RoleState({**news, "count": mean.count, "mean": mean.compute})


class _TangentMean:
    """The mean of the tangents with the present one in it. It holds the tangents, not the step's directions.

    Attributes:
        count: Number of tangents in it.
    """

    def __init__(self, context: PredictionContext, state: RoleState, tangent: Sequence[Tensor]) -> None:
        self._tangent, self._beta, saved = list(tangent), context.beta, state.shared
        fits = "mean" in saved and [m.shape for m in saved["mean"]] == [t.shape for t in self._tangent]
        self._known = saved if fits and not context.mix.restarted else {}  # else it begins with this tangent
        self.count: int = self._known.get("count", 0) + 1

    def compute(self) -> list[Tensor]:
        """Return the mean."""
        known = self._known["mean"] if self._known else foreach.mul(self._tangent, 0.0)
        mean = list(map(scattered, known, self._tangent))
        return foreach.lerp(mean, self._tangent, 1.0 - self._beta)


def prediction_of(option: Any) -> Prediction:
    """Return the role that the option ``carry`` names, or the user's own."""
    if option == "auto":
        return Offered()
    if isinstance(option, bool):
        return Always() if option else Never()
    role: Prediction = option
    return role
