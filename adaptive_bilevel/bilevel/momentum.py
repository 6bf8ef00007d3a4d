"""How much of the mean of past hypergradients a step should take, found from the hypergradients themselves.

The search certifies a step along A^{-1} h. A step along the mean m instead is better where h is noisy, since m has less
of the noise, and worse where h is exact and turns, since m is late; and nothing certifies it. Which of the two it is,
the hypergradients tell: the step is along

    A^{-1} ((1 - theta) h_k + theta m_k),

with the theta for which that mixture predicts the next hypergradient best, by least squares over the steps so far,

    theta = sum <h_{k+1} - h_k, m_k - h_k> / sum ||m_k - h_k||^2    in A^{-1}'s metric, in [0, 1],

both sums decaying like m, each term in units of ||h_{k+1}||^2 + ||h_k||^2 (large early hypergradients would outweigh
all later ones), and the lower sum beginning at 1: the certified direction is taken until there is evidence against it.
With independent noise on a slow gradient, theta is close to 1; where the gradient is exact and changes slowly, close
to 0. It needs four inner products and one more copy of h, no evaluation, and no number.

A mixture that does not descend on the present sample is replaced by the certified direction, and the mean starts anew
(the gradient restart of O'Donoghue and Candes, arXiv 1204.3982).

Measured (``examples/benchmarks/NOTES.md``): hyper-cleaning with full batches .21 -> .16 in validation loss, with
minibatches of hyper-representation as good as m alone and far better than h alone; along the plain hypergradient too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.reductions import agree, on_host
from ..evaluation.vectors import inner
from ..optim.direction import Descent, mean

__all__ = ["blended", "blended_tangent"]


def blended(
    descent: Descent,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    factors: Sequence[float],
    state: Any,
    beta: float,
    *,
    weight: float | None = None,
) -> tuple[Descent, Callable[[], list[Tensor]] | None]:
    """Return the direction, and what computes its step, a mixture of the searched direction and of the mean.

    That is None where the step is the searched direction. It is computed when the step is taken, and not before, so
    that the search need not hold it.

    Args:
        descent: The direction to search along.
        parameters: The parameters, keys of `state`.
        grads: Their hypergradients h.
        factors: Of each parameter's part of the direction.
        state: An optimizer's state; per parameter it holds "exp_avg" and "averaged" (see `mean`) and "last", the
            hypergradient before; under "momentum" the two sums.
        beta: Decay of the mean and of the sums, in [0, 1).
        weight: theta, if it is not to be found.
    """
    if not parameters:
        return descent, None
    average = mean(parameters, grads, state, beta)
    sums = _sums(descent, parameters, grads, state, beta) if weight is None else {}
    theta = _ratio(sums) if weight is None else weight

    def step() -> list[Tensor]:
        mixture = average.moment()
        torch._foreach_div_(mixture, average.mass)
        if theta < 1.0:
            mixture = list(torch._foreach_lerp(list(grads), mixture, theta))
        return descent.precondition(mixture)

    restarted = False
    if theta > 0.0 and weight is None and float(agree(inner(grads, step(), factors))[0]) <= 0.0:
        restarted, theta = True, 0.0
        average = mean(parameters, grads, state, beta, restart=True)

    searched = descent.commit  # not the descent itself, whose metric is not needed any more then

    def commit(moved: Tensor | bool = True) -> None:
        searched(moved)
        average.commit(moved)
        if weight is None:
            for p, h in zip(parameters, grads, strict=True):
                state[p] = {**state[p], "last": h.clone()}
            state["momentum"] = sums

    return descent._replace(commit=commit, weight=theta, restarted=restarted), step if theta > 0.0 else None


def blended_tangent(
    tangent: Sequence[Tensor], state: Any, beta: float, *, weight: float, restarted: bool
) -> list[Tensor]:
    """Return how y answers to one unit of a step along such a mixture.

    Along the mean of the hypergradients that is the mean of the tangents, averaged likewise. A solve for the mean
    itself would cost as much as the tangent; the mean of the solves so far is free, and differs by how H, C and A
    changed meanwhile. Measured on random quadratics (Adam, T = 1, mu = .01, momentum=True): median gap 2.7e-3, against
    4.9e-2 with the tangent of the searched direction.

    Args:
        tangent: That of the searched direction.
        state: An optimizer's state; under "tangents" it holds the mean and how many are in it.
        beta: Decay of the mean, in [0, 1).
        weight: theta.
        restarted: Whether the mean of the hypergradients was started anew.
    """
    saved = None if restarted else state.get("tangents")
    saved = saved or {"count": 0, "mean": torch._foreach_mul(list(tangent), 0.0)}
    count = saved["count"] + 1
    average = list(torch._foreach_lerp(list(saved["mean"]), list(tangent), 1.0 - beta))
    state["tangents"] = {"count": count, "mean": average}
    return list(torch._foreach_lerp(list(tangent), list(torch._foreach_div(average, 1.0 - beta**count)), weight))


def _sums(
    descent: Descent, parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, beta: float
) -> dict[str, Any]:
    """Return numerator and denominator of theta with the latest hypergradient in them."""
    sums = dict(state.get("momentum") or {"agreement": 0.0, "spread": 1.0})
    known = [state.get(p, {}) for p in parameters]
    if not all("last" in saved for saved in known):  # the first step, or a parameter that has just begun to take part
        return sums
    last = [saved["last"] for saved in known]
    lag = list(
        torch._foreach_div([saved["exp_avg"] for saved in known], [1.0 - beta ** saved["averaged"] for saved in known])
    )
    torch._foreach_sub_(lag, last)
    scaled = descent.precondition(lag)
    products = [inner(lag, scaled)]
    del lag
    products.append(inner(torch._foreach_sub(list(grads), last), scaled))
    del scaled
    products += [inner(tensors, descent.precondition(tensors)) for tensors in (grads, last)]
    spread, agreement, new, old = on_host(*products)
    size = new + old
    if size > 0.0 and math.isfinite(agreement / size) and math.isfinite(spread / size):
        sums["agreement"] += (1.0 - beta) * (agreement / size - sums["agreement"])
        sums["spread"] += (1.0 - beta) * (spread / size - sums["spread"])
    return sums


def _ratio(sums: dict[str, Any]) -> float:
    """Return theta from the two sums."""
    agreement, spread = sums["agreement"], sums["spread"]
    return min(max(agreement / spread, 0.0), 1.0) if spread > 0.0 else 0.0
