"""The Direction role: the direction that a step size multiplies, for the search and for the step.

Plain gradients search and step along g. Adam searches along A^{-1} g, for which the test of sufficient decrease holds,
and steps along A^{-1} m (Fan et al., 2023, Algorithm 2), with A = sqrt(v / (1 - beta2^n)) + eps. Both moments are
bias-corrected. The share of m in an upper step is that of the Momentum role: `adaptive_bilevel.bilevel.momentum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.vectors import cast_like, products, widen
from .moments import Moment, mean, mean_square
from .state import RoleState

__all__ = [
    "DIRECTIONS",
    "Adam",
    "AdamMetric",
    "Descent",
    "Direction",
    "Gradient",
    "Moment",
    "Plain",
    "Proposed",
    "mean",
    "move",
]

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
        foreach.add_(params, directions, alpha=-step)
        return
    for factor in sorted(set(factors)):
        chosen = [i for i, w in enumerate(factors) if w == factor]
        foreach.add_([params[i] for i in chosen], [directions[i] for i in chosen], alpha=-step * factor)


class Gradient(NamedTuple):
    """The parameters that have a gradient, with their gradients and factors.

    Attributes:
        tensors: The parameters.
        values: Their gradients g, or hypergradients h.
        factors: Factor of the step for each parameter, lr_i / lr_0 of its group.
    """

    tensors: list[Tensor]
    values: list[Tensor]
    factors: list[float]


class Descent(NamedTuple):
    """The directions of the search and of the step.

    Attributes:
        precondition: Maps gradients g to A^{-1} g, the direction of the search.
        step: Direction of the step; None for that of the search.
        memory: Data for the direction's ``commit``.
        move: Moves parameters by -step * factor * direction, with the rounding of the direction's owner.
    """

    precondition: Callable[[Sequence[Tensor]], list[Tensor]]
    step: list[Tensor] | None = None
    memory: Any = None
    move: Callable[[Sequence[Tensor], Sequence[Tensor], float, Sequence[float]], None] = move


class Direction(Protocol):
    """The Direction role, for an optimizer's option ``direction``.

    Attributes:
        kind: "sgd" if it is the gradient itself, so that defaults measured for plain gradients apply.
    """

    kind: str

    def init(self) -> RoleState:
        """Return the state before the first step."""
        ...

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return the directions at this gradient."""
        ...

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return what is new in the state after the step.

        Args:
            gradient: The argument of ``propose``.
            descent: The result of ``propose``.
            state: The argument of ``propose``.
            moved: Whether the step moved anything, as a tensor if only the device knows. If false, nothing changes.
        """
        ...


class Proposed(NamedTuple):
    """What the Direction role proposed for a step.

    Attributes:
        descent: The directions.
        role: The role.
        before: Its state.
    """

    descent: Descent
    role: Direction
    before: RoleState


@final
class Plain:
    """The gradient itself; nothing is kept."""

    kind = "sgd"

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return g to search and to step along."""
        return Descent(list)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return nothing new."""
        return RoleState()

    def __repr__(self) -> str:
        return "Plain()"


@final
class AdamMetric:
    """Adam's metric alone: searched and stepped is A^{-1} g, A = (1 - w) R + w rms(R) + eps.

    R = sqrt(v / (1 - beta^n)), rms(R) is the root mean square of the entries of R in the same tensor, and

        w = shrinkage / (1 + sqrt((1 - beta^n) / (1 - beta))),

    so that rms(R) counts as much as the first gradient, and less and less beside later ones: v is a mean of
    (1 - beta^n) / (1 - beta) gradients. With w = 0 it is the metric of Adam, whose first direction is sign(g): an entry
    whose gradient is small moves as far as all others.

    Per parameter the state holds "step" (n) and "exp_avg_sq" (v).

    Args:
        beta: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        shrinkage: Twice the weight of rms(R) at the first gradient, in [0, 1].
    """

    kind = "adam"

    def __init__(self, beta: float, eps: float, shrinkage: float = 0.0) -> None:
        self._beta, self._eps, self._shrinkage = beta, eps, shrinkage

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return A^{-1} g to search and to step along."""
        if not gradient.tensors:
            return Descent(list)
        root, second = self.root(gradient, state)
        return Descent(lambda g: _divided(g, root, gradient.values), memory=second)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return the second moment with this gradient in it."""
        return RoleState() if descent.memory is None else descent.memory.commit(moved)

    def root(self, gradient: Gradient, state: RoleState) -> tuple[list[Tensor], Moment]:
        """Return A, and the second moment."""
        second = mean_square(gradient.values, state.each, self._beta)
        root = second.moment()
        foreach.sqrt_(root)
        foreach.div_(root, [mass**0.5 for mass in second.mass])
        if self._shrinkage > 0.0:
            weights = [self._shrinkage / (1.0 + (mass / (1.0 - self._beta)) ** 0.5) for mass in second.mass]
            means = [(square / r.numel()).sqrt() for square, r in zip(products(root, root, None), root, strict=True)]
            foreach.mul_(root, [1.0 - w for w in weights])
            foreach.add_(root, [w * mean for w, mean in zip(weights, means, strict=True)])
        foreach.add_(root, self._eps)
        return root, second

    def shrunk(self, shrinkage: float) -> AdamMetric:
        """Return the metric with this shrinkage."""
        return AdamMetric(self._beta, self._eps, shrinkage)


@final
class Adam:
    """Adam's directions as `torch.optim.Adam` computes them: A^{-1} g to search, A^{-1} m to step.

    Per parameter the state holds what that of `AdamMetric` and `mean` holds.

    Args:
        betas: Decay of the first and of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
    """

    kind = "adam"

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._beta, self._metric = betas[0], AdamMetric(betas[1], eps)

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return A^{-1} g to search along, and A^{-1} m to step along."""
        if not gradient.tensors:
            return Descent(list)
        root, second = self._metric.root(gradient, state)
        first = mean(gradient.values, state.each, self._beta)
        step = first.moment()
        foreach.div_(step, root)
        foreach.div_(step, first.mass)
        step = list(cast_like(step, gradient.values))
        return Descent(lambda g: _divided(g, root, gradient.values), step, memory=(second, first))

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return both moments with this gradient in them."""
        if descent.memory is None:
            return RoleState()
        second, first = (moment.commit(moved) for moment in descent.memory)
        each = [{**s, **f} for s, f in zip(second.each, first.each, strict=True)]
        return RoleState(each=each, deferred={**second.deferred, **first.deferred})


def _divided(gradients: Sequence[Tensor], root: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return g / A, which is in at least float32, in the dtypes of ``like``."""
    return list(cast_like(foreach.div(widen(gradients), root), like))
