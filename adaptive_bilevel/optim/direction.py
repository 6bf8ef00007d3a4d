"""Directions: what a step size multiplies. A direction is searched along, and a (possibly other) one is stepped.

Plain gradients search and step along g. Adam searches along A^{-1} g, which the sufficient-decrease test certifies,
and steps along A^{-1} m (Fan et al., 2023, Algorithm 2), A = sqrt(v / (1 - beta2^n)) + eps, both moments
bias-corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Descent", "Direction", "adam", "move", "sgd"]

DIRECTIONS = ("sgd", "adam")


def move(params: Sequence[Tensor], directions: Sequence[Tensor], step: float, factors: Sequence[float]) -> None:
    """Move the parameters by -step * factor * direction, as torch.optim.SGD moves them."""
    if all(w == 1.0 for w in factors):
        torch._foreach_add_(list(params), list(directions), alpha=-step)
        return
    for factor in sorted(set(factors)):
        chosen = [i for i, w in enumerate(factors) if w == factor]
        torch._foreach_add_([params[i] for i in chosen], [directions[i] for i in chosen], alpha=-step * factor)


class Descent(NamedTuple):
    """A pair of directions.

    Attributes:
        precondition: g -> A^{-1} g, the direction to search along, for any gradients g.
        step: The direction to step along; None: the searched one.
        commit: Takes the step's moments into the state; not called for a step that must leave no trace. Where whether
            it must is only known on the device, it takes them if the given tensor is true.
        move: Moves parameters by -step * factor * direction, in the roundings of whoever made the direction.
    """

    precondition: Callable[[Sequence[Tensor]], list[Tensor]]
    step: list[Tensor] | None
    commit: Callable[..., None]
    move: Callable[[Sequence[Tensor], Sequence[Tensor], float, Sequence[float]], None] = move


class Direction(Protocol):
    """A direction of somebody else's making, for an optimizer's option ``direction``.

    Attributes:
        kind: "sgd" if it is the gradient itself, so that defaults measured for plain gradients apply.
    """

    kind: str

    def __call__(self, parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any) -> Descent:
        """Return the directions at these gradients; `state` is the optimizer's, for numbers and tensors to keep."""
        ...


def sgd() -> Descent:
    """Return the plain direction."""
    return Descent(list, None, lambda moved=True: None)


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
    if not parameters:
        return sgd()
    beta1, beta2 = betas
    known = [state.get(p, {}) for p in parameters]
    counts = [saved.get("step", 0) + 1 for saved in known]
    if any(isinstance(n, Tensor) for n in counts):  # counted on the device, and perhaps a parameter that came later
        counts = [torch.as_tensor(n, device=g.device) for n, g in zip(counts, grads, strict=True)]
    old_first, old_second = (
        [saved[name] if name in saved else torch.zeros_like(g) for saved, g in zip(known, grads, strict=True)]
        for name in ("exp_avg", "exp_avg_sq")
    )
    first = list(torch._foreach_lerp(old_first, list(grads), 1.0 - beta1))
    second = list(torch._foreach_mul(old_second, beta2))
    torch._foreach_addcmul_(second, list(grads), list(grads), 1.0 - beta2)
    root = list(torch._foreach_sqrt(second))
    torch._foreach_div_(root, [(1.0 - beta2**n) ** 0.5 for n in counts])
    torch._foreach_add_(root, eps)
    step = list(torch._foreach_div(first, root))
    torch._foreach_div_(step, [1.0 - beta1**n for n in counts])

    def precondition(g: Sequence[Tensor]) -> list[Tensor]:
        return list(torch._foreach_div(list(g), root))

    def commit(moved: Tensor | bool = True) -> None:
        for p, n, m, v, m0, v0 in zip(parameters, counts, first, second, old_first, old_second, strict=True):
            if isinstance(moved, Tensor):
                n = torch.where(moved, n, n - 1)
                m, v = torch.where(moved, m, m0), torch.where(moved, v, v0)
            state[p] = {**state[p], "step": n, "exp_avg": m, "exp_avg_sq": v}

    return Descent(precondition, step, commit)
