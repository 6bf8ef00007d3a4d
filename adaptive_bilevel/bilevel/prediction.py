"""The Prediction role: does y move along with x, to where the response predicts its solution?

| ``carry=`` | class | y |
|---|---|---|
| False | `Never` | stays |
| True | `Always` | moves by the step times its response |
| "auto" | `Offered` | moves likewise; the next lower step may go back, see `AdaptiveOptimizer.offer` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

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
    """y moves along. The state holds "mean", the mean of the tangents, and "count", the number of them in it."""

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


def _mixed(context: PredictionContext, state: RoleState) -> list[Tensor]:
    """Return how y answers to one unit of a step along a mixture of the searched direction and the mean of the h.

    Along the mean of the hypergradients the answer is the mean of the tangents, averaged likewise. A solve for the mean
    itself would cost as much as the tangent; the mean of the solves so far is free, and differs by how H, C and A
    changed meanwhile. Measured on random quadratics (Adam, T = 1, mu = .01, momentum=True): median gap 2.7e-3, against
    4.9e-2 with the tangent of the searched direction.
    """
    tangent = list(context.offsets)
    if not context.mix.averages:
        return tangent
    mean, count = _with(tangent, context, state)
    torch._foreach_div_(mean, 1.0 - context.beta**count)
    return list(torch._foreach_lerp(tangent, mean, context.mix.weight))


def _averaged(context: PredictionContext, state: RoleState) -> RoleState:
    """Return the mean with this tangent in it; it is computed when it is written."""
    if not context.mix.averages:
        return RoleState()
    count = _known(list(context.offsets), context, state).get("count", 0) + 1
    return RoleState({"count": count, "mean": lambda: _with(list(context.offsets), context, state)[0]})


def _with(tangent: list[Tensor], context: PredictionContext, state: RoleState) -> tuple[list[Tensor], int]:
    """Return the mean of the tangents with this one in it, and their number."""
    known = _known(tangent, context, state)
    mean = known["mean"] if known else torch._foreach_mul(tangent, 0.0)
    return list(torch._foreach_lerp(list(mean), tangent, 1.0 - context.beta)), known.get("count", 0) + 1


def _known(tangent: list[Tensor], context: PredictionContext, state: RoleState) -> Mapping[str, Any]:
    """Return the mean so far and its count; {} where it begins with this tangent."""
    saved = state.shared
    fits = "mean" in saved and [m.shape for m in saved["mean"]] == [t.shape for t in tangent]
    return saved if fits and not context.mix.restarted else {}


def prediction_of(option: Any) -> Prediction:
    """Return the role that the option ``carry`` names, or the user's own."""
    if option == "auto":
        return Offered()
    if isinstance(option, bool):
        return Always() if option else Never()
    role: Prediction = option
    return role
