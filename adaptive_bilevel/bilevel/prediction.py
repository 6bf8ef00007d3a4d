"""The Prediction role: does y move along with x, to where the response predicts its solution?

| ``carry=`` | class | y |
|---|---|---|
| False | `Never` | stays |
| True | `Always` | moves by the step times its response |
| "auto" | `BestShare` | moves by the share of that which earlier moves were worth |
| "auto", `Neumann` | `Never` | stays: the lower loop makes the steps that the series has summed |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.parts import scattered
from ..evaluation.reductions import agree, on_host
from ..evaluation.vectors import inner, inners, rounding
from ..hypergradient.solution import LinearSolver
from ..optim.state import RoleState
from .context import PredictedMove, PredictionContext
from .inverse import transient
from .roles import Prediction, ResponseModel
from .share import Parabola, Share

__all__ = ["Always", "BestShare", "Never", "observed", "predicted", "prediction_of"]

_SINGLE = torch.finfo(torch.float32).eps
"""The rounding of inner products: those of half precision are taken in float32."""


@final
class Never:
    """y stays where it is."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def observe(self, gradient: Sequence[Tensor], lower: Sequence[Tensor], state: RoleState) -> Share | None:
        """Return None."""
        return None

    def propose(self, context: PredictionContext, state: RoleState) -> PredictedMove | None:
        """Return None."""
        return None

    def commit(self, context: PredictionContext, move: PredictedMove | None, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class Always:
    """y moves along.

    Where the length of the step was kept, there is no tangent of its own, and the last one, w_s, is that of another
    direction, d_s. A tangent is linear in its direction, so y follows the part of d that is along d_s, in the metric of
    the direction (where <d, d_s> = <h, d_s>):

        w = theta w_s,    theta = <h, d_s> / <h, d>_s    in +-sqrt(<h, d> / <h, d>_s).

    The whole w_s would move y wrongly where d has turned. Along small eigenvalues of the lower Hessian, few lower steps
    do not correct that, and the next hypergradients are wrong.

    The state holds "mean", the mean of the tangents, and "count", the number of them in it; and "last", the last
    tangent, with "promised", its <h, d>_s, and per parameter "along", its d_s.
    """

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def observe(self, gradient: Sequence[Tensor], lower: Sequence[Tensor], state: RoleState) -> Share | None:
        """Return None."""
        return None

    def propose(self, context: PredictionContext, state: RoleState) -> PredictedMove | None:
        """Return the response along what is stepped along."""
        response = _mixed(context, state)
        return None if response is None else PredictedMove(response)

    def commit(self, context: PredictionContext, move: PredictedMove | None, state: RoleState) -> RoleState:
        """Return the mean with this tangent in it."""
        return _averaged(context, state)


@final
class BestShare:
    """y moves along by a share of what `Always` moves it by, see `adaptive_bilevel.bilevel.share`.

    The state is that of `Always`. It also holds the last move: "moved", the response r, with "length", the step,
    "square", ||r||^2, "curvature", the Rayleigh quotient along r, "kept", the share, and "place", <y, r> after it;
    and "slope" and "bend", the `Share`.
    """

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def observe(self, gradient: Sequence[Tensor], lower: Sequence[Tensor], state: RoleState) -> Share | None:
        """Return the share with the parabola of the last move in it; None if there is no move that can be seen."""
        known, moved = state.shared, state.shared.get("moved", ())
        if not moved or [m.shape for m in moved] != [y.shape for y in lower]:
            return None
        moved = list(map(scattered, moved, lower))
        slope, place, size = on_host(*inners((gradient, moved), (lower, moved), (lower, lower)))
        length, square = known["length"], known["square"]
        if length * length * square <= min(rounding(lower), _SINGLE) * size:  # <y, r> is not known well enough
            return None
        reached = known["kept"] + (place - known["place"]) / (length * square)
        curvature = known["curvature"] * length * length * square
        return _share(state).after(Parabola.at(reached, length * slope, curvature))

    def propose(self, context: PredictionContext, state: RoleState) -> PredictedMove | None:
        """Return the response along what is stepped along, and the share of it."""
        response = _mixed(context, state)
        if response is None:
            return None
        share = _share(state) if context.share is None else context.share
        return PredictedMove(response, share.value, share)

    def commit(self, context: PredictionContext, move: PredictedMove | None, state: RoleState) -> RoleState:
        """Return the mean with this tangent in it, the share, and the move."""
        news = _averaged(context, state)
        if move is None:
            return news
        assert move.share is not None
        place, square = on_host(*inners((context.lower.tensors(), move.response), (move.response, move.response)))
        last = {
            "moved": move.response if context.step > 0.0 else [],
            "length": context.step,
            "square": square,
            "curvature": context.curvature if context.offsets is not None else state.shared.get("curvature", math.nan),
            "kept": move.part,
            "place": place + move.part * context.step * square,
        }
        return news._replace(shared={**news.shared, **move.share._asdict(), **last})


def _share(state: RoleState) -> Share:
    return Share(state.shared.get("slope", 0.0), state.shared.get("bend", 0.0))


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
    """Return the tangent of this step, or what the last one tells of it; None if there is none."""
    if context.offsets is not None:
        return list(context.offsets)
    last, tensors = state.shared.get("last", ()), context.lower.tensors()
    if [w.shape for w in last] != [y.shape for y in tensors] or not last:
        return None
    if not all("along" in own for own in state.each):  # a parameter that has just begun
        return None
    last = list(map(scattered, last, tensors))  # a checkpoint that was read whole has whole ones
    return foreach.mul(last, _part_along(context, state))


def _part_along(context: PredictionContext, state: RoleState) -> float:
    """Return theta of `Always`."""
    before: float = state.shared["promised"]
    (along,) = agree(inner(context.gradient.values, [own["along"] for own in state.each]))
    most = math.sqrt(context.promised / before)
    return min(max(float(along) / before, -most), most)


def _averaged(context: PredictionContext, state: RoleState) -> RoleState:
    """Return the tangent, and the mean with it in it, which is computed when it is written."""
    if context.offsets is None:
        return RoleState()
    news, deferred, along = dict[str, Any](), dict[str, Callable[[], list[Tensor]]](), context.along
    if along is not None:
        news = {"last": list(context.offsets), "promised": context.promised}
        deferred = {"along": lambda: [d.clone() for d in along]}
    if context.mix.averages:
        mean = _TangentMean(context, state, context.offsets)
        news |= {"count": mean.count, "mean": mean.compute}
    return RoleState(news, deferred=deferred)


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


def observed(role: Prediction, model: ResponseModel, lower: Sequence[Tensor], state: RoleState) -> Share | None:
    """Return what y and its gradient show of the moves so far, where the response knows that gradient."""
    gradient = getattr(model, "lower_gradient", None)
    return None if gradient is None else role.observe(gradient, lower, state)


def predicted(role: Prediction, context: PredictionContext, state: RoleState) -> RoleState:
    """Let y move along if the step moved x, and return what is new in the prediction's state."""
    move = role.propose(context, state)
    news = role.commit(context, move, state)
    if move is not None and context.step > 0.0:
        context.lower.carry(move.response, context.step * move.part)
    return news


def prediction_of(option: Any, solver: LinearSolver) -> Prediction:
    """Return the role that the option ``carry`` names for the solver of the response, or the user's own."""
    if option == "auto":
        return Never() if transient(solver) else BestShare()
    if isinstance(option, bool):
        return Always() if option else Never()
    role: Prediction = option
    return role
