"""Directions: what a step size multiplies. A direction is searched along, and a (possibly other) one is stepped.

Plain gradients search and step along g. Adam searches along A^{-1} g, which the sufficient-decrease test certifies,
and steps along A^{-1} m (Fan et al., 2023, Algorithm 2), A = sqrt(v / (1 - beta2^n)) + eps, both moments
bias-corrected. How much of m a step should take is a question of its own: `adaptive_bilevel.bilevel.momentum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Descent", "Direction", "adam", "mean", "metric", "move", "sgd"]

DIRECTIONS = ("sgd", "adam")


_FITS_ALL = torch.finfo(torch.float16).max
"""A step up to here can be represented in every dtype."""


def move(params: Sequence[Tensor], directions: Sequence[Tensor], step: float, factors: Sequence[float]) -> None:
    """Move the parameters by -step * factor * direction, as torch.optim.SGD moves them.

    A step that their dtype cannot represent leaves it, as one does whose product with the direction is too large.
    """
    if abs(step) > _FITS_ALL:
        most = min(torch.finfo(p.dtype).max for p in params)
        step = step if abs(step) <= most else math.copysign(math.inf, step)
    if factors.count(1.0) == len(factors):
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
        weight: How much of `step` is along the mean of the gradients, in [0, 1]; the rest is along the searched one.
        restarted: Whether that mean was started anew.
    """

    precondition: Callable[[Sequence[Tensor]], list[Tensor]]
    step: list[Tensor] | None
    commit: Callable[..., None]
    move: Callable[[Sequence[Tensor], Sequence[Tensor], float, Sequence[float]], None] = move
    weight: float = 0.0
    restarted: bool = False


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


def metric(parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, beta: float, eps: float) -> Descent:
    """Return Adam's metric alone: searched and stepped is A^{-1} g, A = sqrt(v / (1 - beta^n)) + eps.

    Args:
        parameters: The parameters, keys of `state`.
        grads: Their gradients.
        state: An optimizer's state; per parameter it holds "step" (n) and "exp_avg_sq" (v).
        beta: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
    """
    if not parameters:
        return sgd()
    root, commit = _metric(parameters, grads, state, beta, eps)
    return Descent(lambda g: list(torch._foreach_div(list(g), root)), None, commit)


def _metric(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, beta: float, eps: float
) -> tuple[list[Tensor], Callable[..., None]]:
    """Return A, and what takes its second moment into the state."""
    known = [state.get(p, {}) for p in parameters]
    counts, old = _counts(known, "step", grads), [saved.get("exp_avg_sq") for saved in known]

    def advanced() -> list[Tensor]:
        second = list(torch._foreach_mul(_so_far(old, grads), beta))
        torch._foreach_addcmul_(second, list(grads), list(grads), 1.0 - beta)
        return second

    root = advanced()
    torch._foreach_sqrt_(root)
    torch._foreach_div_(root, [(1.0 - beta**n) ** 0.5 for n in counts])
    torch._foreach_add_(root, eps)

    def commit(moved: Tensor | bool = True) -> None:
        # Computed anew, since until here it would be one more copy.
        moments = advanced(), _so_far(old, grads)
        _keep(parameters, state, moved, step=(counts, [n - 1 for n in counts]), exp_avg_sq=moments)

    return root, commit


class Mean(NamedTuple):
    """The moving mean of the gradients, Adam's first moment.

    Attributes:
        moment: Computes m.
        mass: 1 - beta^n of each parameter, by which m is to be divided.
        commit: As in `Descent`.
    """

    moment: Callable[[], list[Tensor]]
    mass: list[Any]
    commit: Callable[..., None]


def mean(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, beta: float, *, restart: bool = False
) -> Mean:
    """Return the moving mean with these gradients in it, or of these alone.

    Args:
        parameters: The parameters, keys of `state`.
        grads: Their gradients.
        state: An optimizer's state; per parameter it holds "averaged" (n) and "exp_avg" (m).
        beta: Decay, in [0, 1).
        restart: Forget all gradients before.
    """
    known = [{} if restart else state.get(p, {}) for p in parameters]
    counts, old = _counts(known, "averaged", grads), [saved.get("exp_avg") for saved in known]

    def moment() -> list[Tensor]:
        return list(torch._foreach_lerp(_so_far(old, grads), list(grads), 1.0 - beta))

    def commit(moved: Tensor | bool = True) -> None:
        moments = moment(), _so_far(old, grads)
        _keep(parameters, state, moved, averaged=(counts, [n - 1 for n in counts]), exp_avg=moments)

    return Mean(moment, [1.0 - beta**n for n in counts], commit)


def adam(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any, betas: tuple[float, float], eps: float
) -> Descent:
    """Return Adam's directions as `torch.optim.Adam` computes them: A^{-1} g to search, A^{-1} m to step.

    Args:
        parameters: The parameters, keys of `state`.
        grads: Their gradients.
        state: An optimizer's state, see `metric` and `mean`.
        betas: Decay of the first and of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
    """
    if not parameters:
        return sgd()
    root, commit_metric = _metric(parameters, grads, state, betas[1], eps)
    first = mean(parameters, grads, state, betas[0])
    step = first.moment()
    torch._foreach_div_(step, root)
    torch._foreach_div_(step, first.mass)

    def commit(moved: Tensor | bool = True) -> None:
        commit_metric(moved)
        first.commit(moved)

    return Descent(lambda g: list(torch._foreach_div(list(g), root)), step, commit, weight=1.0)


def _counts(known: Sequence[dict[str, Any]], name: str, grads: Sequence[Tensor]) -> list[Any]:
    """Return how many gradients each parameter has seen, these included."""
    counts = [saved.get(name, 0) + 1 for saved in known]
    if any(isinstance(n, Tensor) for n in counts):  # counted on the device, and perhaps a parameter that came later
        counts = [torch.as_tensor(n, device=g.device) for n, g in zip(counts, grads, strict=True)]
    return counts


def _so_far(moments: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the moments before these gradients, zeros where there are none."""
    return [torch.zeros_like(g) if m is None else m for m, g in zip(moments, grads, strict=True)]


def _keep(
    parameters: Sequence[Tensor], state: Any, moved: Tensor | bool, **values: tuple[Sequence[Any], Sequence[Any]]
) -> None:
    """Write new values (or, where a step on the device did not move, old ones) into the state."""
    for name, (new, old) in values.items():
        for p, after, before in zip(parameters, new, old, strict=True):
            kept = torch.where(moved, after, before) if isinstance(moved, Tensor) else after
            state[p] = {**state[p], name: kept}
