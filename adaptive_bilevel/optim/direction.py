"""Directions: what a step size multiplies. A direction is searched along, and a (possibly other) one is stepped.

Plain gradients search and step along g. Adam searches along A^{-1} g, which the sufficient-decrease test certifies,
and steps along A^{-1} m (Fan et al., 2023, Algorithm 2), A = sqrt(v / (1 - beta2^n)) + eps, both moments
bias-corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Descent", "adam", "sgd"]

DIRECTIONS = ("sgd", "adam")


class Descent(NamedTuple):
    """A pair of directions.

    Attributes:
        precondition: g -> A^{-1} g, the direction to search along, for any gradients g.
        step: The direction to step along; None: the searched one.
        commit: Takes the step's moments into the state; not called for a step that must leave no trace.
    """

    precondition: Callable[[Sequence[Tensor]], list[Tensor]]
    step: list[Tensor] | None
    commit: Callable[[], None]


def sgd() -> Descent:
    """Return the plain direction."""
    return Descent(list, None, lambda: None)


def adam(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, betas: tuple[float, float], eps: float
) -> Descent:
    """Return Adam's direction, as `torch.optim.Adam` computes it.

    Args:
        parameters: The parameters, keys of `state`.
        grads: Their gradients.
        state: An optimizer's state; per parameter it holds "step", "exp_avg" and "exp_avg_sq".
        betas: Decay of the first and of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
    """
    beta1, beta2 = betas
    counts = [state[p].get("step", 0) + 1 for p in parameters]
    zeros = [torch.zeros_like(g) if n == 1 else None for n, g in zip(counts, grads, strict=True)]
    first = [z if z is not None else state[p]["exp_avg"] for z, p in zip(zeros, parameters, strict=True)]
    second = [z if z is not None else state[p]["exp_avg_sq"] for z, p in zip(zeros, parameters, strict=True)]
    first = list(torch._foreach_lerp(first, list(grads), 1.0 - beta1))
    second = list(torch._foreach_mul(second, beta2))
    torch._foreach_addcmul_(second, list(grads), list(grads), 1.0 - beta2)
    root = torch._foreach_sqrt(second)
    torch._foreach_div_(root, [(1.0 - beta2**n) ** 0.5 for n in counts])
    torch._foreach_add_(root, eps)
    step = list(torch._foreach_div(first, root))
    torch._foreach_div_(step, [1.0 - beta1**n for n in counts])

    def precondition(g: Sequence[Tensor]) -> list[Tensor]:
        return list(torch._foreach_div(list(g), root))

    def commit() -> None:
        for p, n, m, v in zip(parameters, counts, first, second, strict=True):
            state[p] = {**state[p], "step": n, "exp_avg": m, "exp_avg_sq": v}

    return Descent(precondition, step, commit)
