"""The Momentum role: how much of the mean of past hypergradients a step takes.

The search certifies a step along A^{-1} h. A step along the mean m instead is better where h is noisy, since m has less
of the noise, and worse where h is exact and turns, since m is late; and nothing certifies it.

| ``momentum=`` | class | the step is along |
|---|---|---|
| False | `Certified` | the searched direction |
| True | `Full` | A^{-1} m |
| "auto" | `Predictive` | A^{-1} ((1 - theta) h + theta m) |

With "auto", another direction is searched and stepped along where f is one function of x in every step, see
`adaptive_bilevel.bilevel.secant`.

Measured (``examples/benchmarks/NOTES.md``): hyper-cleaning with full batches .21 -> .16 in validation loss, with
minibatches of hyper-representation as good as m alone and far better than h alone; along the plain hypergradient too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

from torch import Tensor

from ..evaluation import foreach
from ..evaluation.reductions import agree, on_host
from ..evaluation.vectors import cast_like, inner, inners, widen
from ..optim.direction import AdamMetric, Direction
from ..optim.moments import Moment, mean
from ..optim.state import RoleState
from .context import Mix, MomentumContext
from .roles import Momentum

__all__ = ["Certified", "Full", "Predictive", "momentum_of", "shrunk"]


@final
class Certified:
    """The step is along the searched direction, or along what a direction of the user's steps along."""

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        """Return the direction's own step."""
        step = context.descent.step
        return Mix(None if step is None else step.copy)

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


@final
class Full:
    """The step is along the mean of the hypergradients, m_k = beta m_{k-1} + (1 - beta) h_k, bias-corrected.

    Per parameter it keeps "exp_avg" and "averaged", see `mean`.
    """

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        """Return A^{-1} m."""
        if not context.gradient.tensors:
            return Mix()
        average = mean(context.gradient.values, state.each, context.beta)
        return Mix(_mixture(context, average, 1.0), 1.0, averages=True, memory=average)

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        """Return the mean with this hypergradient in it."""
        news: RoleState = RoleState() if mix.memory is None else mix.memory.commit()
        return news


class _Predicted(NamedTuple):
    """What `Predictive` commits."""

    average: Moment
    sums: dict[str, float]


@final
class Predictive:
    """The step is along A^{-1} ((1 - theta) h_k + theta m_k), with theta found from the hypergradients themselves.

    theta is the one for which that mixture predicts the next hypergradient best, by least squares over the steps so
    far,

        theta = sum <h_{k+1} - h_k, m_k - h_k> / sum ||m_k - h_k||^2    in A^{-1}'s metric, in [0, 1],

    both sums decaying like m, each term in units of ||h_{k+1}||^2 + ||h_k||^2 (large early hypergradients would
    outweigh all later ones), and the lower sum beginning at 1: the certified direction is taken until there is evidence
    against it. With independent noise on a slow gradient, theta is close to 1; where the gradient is exact and changes
    slowly, close to 0. It needs four inner products and one more copy of h, no evaluation, and no number.

    A mixture that does not descend on the present sample is replaced by the certified direction, and the mean starts
    anew (the gradient restart of O'Donoghue and Candes, arXiv 1204.3982).

    Per parameter it keeps what `Full` keeps, and "last", the hypergradient before; shared, the two sums "agreement" and
    "spread".
    """

    def init(self) -> RoleState:
        """Return the sums before the first step."""
        return RoleState({"agreement": 0.0, "spread": 1.0})

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        """Return the mixture."""
        gradient = context.gradient
        if not gradient.tensors:
            return Mix()
        average = mean(gradient.values, state.each, context.beta)
        sums = self._sums(context, state)
        theta = _ratio(sums)
        step = _mixture(context, average, theta)
        if theta > 0.0 and float(agree(inner(gradient.values, step(), gradient.factors))[0]) <= 0.0:
            average = mean(gradient.values, state.each, context.beta, restart=True)
            return Mix(averages=True, restarted=True, memory=_Predicted(average, sums))
        return Mix(step if theta > 0.0 else None, theta, averages=True, memory=_Predicted(average, sums))

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        """Return mean and sums with this hypergradient in them."""
        if mix.memory is None:
            return RoleState()
        values = context.gradient.values
        news: RoleState = mix.memory.average.commit()
        return news._replace(
            shared=mix.memory.sums, deferred={**news.deferred, "last": lambda: [h.clone() for h in values]}
        )

    def _sums(self, context: MomentumContext, state: RoleState) -> dict[str, float]:
        """Return numerator and denominator of theta with the latest hypergradient in them."""
        beta, precondition, grads = context.beta, context.descent.precondition, context.gradient.values
        sums = dict(state.shared)
        if not all("last" in saved for saved in state.each):  # the first step, or a parameter that has just begun
            return sums
        last = [saved["last"] for saved in state.each]
        masses = [1.0 - beta ** saved["averaged"] for saved in state.each]
        lag = foreach.div([saved["exp_avg"] for saved in state.each], masses)
        foreach.sub_(lag, last)
        scaled = precondition(lag)
        products = [inner(lag, scaled)]
        del lag
        products.append(inner(foreach.sub(grads, last), scaled))
        del scaled
        products += inners((grads, precondition(grads)), (last, precondition(last)))
        spread, agreement, new, old = on_host(*products)
        size = new + old
        if size > 0.0 and math.isfinite(agreement / size) and math.isfinite(spread / size):
            sums["agreement"] += (1.0 - beta) * (agreement / size - sums["agreement"])
            sums["spread"] += (1.0 - beta) * (spread / size - sums["spread"])
        return sums


def _mixture(context: MomentumContext, average: Moment, theta: float) -> Callable[[], list[Tensor]]:
    """Return what computes the mixture; it is computed when it is needed, so that a search does not hold it."""

    def step() -> list[Tensor]:
        mixture = average.moment()
        foreach.div_(mixture, average.mass)
        if theta < 1.0:
            mixture = foreach.lerp(widen(context.gradient.values), mixture, theta)
        return context.descent.precondition(cast_like(mixture, context.gradient.values))

    return step


def _ratio(sums: Mapping[str, float]) -> float:
    """Return theta from the two sums."""
    agreement, spread = sums["agreement"], sums["spread"]
    return min(max(agreement / spread, 0.0), 1.0) if spread > 0.0 else 0.0


def shrunk(direction: Direction, momentum: Momentum, state: RoleState) -> Direction:
    """Return Adam's metric with the shrinkage 1 - theta, theta from `Predictive`; other directions as they are.

    Where hypergradients are exact, theta is 0, and a small entry says how much it matters as well as in which units it
    is: only many steps tell these apart. Where they are noise, theta is 1, and one gradient shows the scale of each.
    """
    if isinstance(direction, AdamMetric) and isinstance(momentum, Predictive):
        return direction.shrunk(1.0 - _ratio(state.shared))
    return direction


def momentum_of(option: Any) -> Momentum:
    """Return the role that the option ``momentum`` names, or the user's own."""
    if option == "auto":
        return Predictive()
    if isinstance(option, bool):
        return Full() if option else Certified()
    role: Momentum = option
    return role
