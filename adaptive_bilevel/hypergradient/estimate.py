"""What an estimator of the hypergradient is: where it is evaluated, and what it returns."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..evaluation.vectors import Vector, add
from .curvature import PartialGradients
from .oracle import Oracle
from .sample import Sample
from .spectral_inverse import SpectralInverse

__all__ = ["Estimate", "Estimator", "Point", "Responding", "Visit", "descend"]


class Visit(NamedTuple):
    """One plain step of the lower loop: y - step * grad_y g(x, y; sample).

    Attributes:
        y: Where it started.
        step: Its step size.
        sample: The sample of its gradient.
    """

    y: Vector
    step: float
    sample: Sample


class Point(NamedTuple):
    """Where an estimator is evaluated: x, y and the auxiliary variables of the literature.

    Attributes:
        x: Upper variable.
        y: Lower variable.
        v: Solution of H v = f_y so far, tracked or as a warm start; empty: zero.
        z: A second lower variable, which minimises g alone (value-function methods).
        multiplier: lambda, the weight of the lower loss in f + lambda g.
        path: The lower loop that led to y, for estimators that differentiate through it.
        memory: What an estimator carries from one evaluation to the next; plain data, read by itself only.
    """

    x: Vector
    y: Vector
    v: Vector = ()
    z: Vector = ()
    multiplier: float = 0.0
    path: tuple[Visit, ...] = ()
    memory: object = None


class Estimate(NamedTuple):
    """What an estimator returns: h = upper_part + lower_part.

    Attributes:
        upper_part: The part that depends on the upper sample linearly (f_x), or all of it.
        lower_part: The part that depends on the lower sample linearly (-C v with a given v); None: there is no such
            split.
        loss: f(x, y), a by-product.
        partials: f_x and f_y at (x, y); None if they were not needed.
        v: The approximation of H^{-1} f_y that was used; None if there was none.
        memory: What `Point.memory` should be next time.
        inverse: P, where it can serve the response of the same point and sample too.
    """

    upper_part: Vector
    lower_part: Vector | None
    loss: Tensor
    partials: PartialGradients | None = None
    v: Vector | None = None
    memory: object = None
    inverse: SpectralInverse | None = None

    @property
    def hypergradient(self) -> Vector:
        """The hypergradient h."""
        return self.upper_part if self.lower_part is None else add(self.upper_part, self.lower_part)


class Estimator(Protocol):
    """A hypergradient estimator: frozen options, and a pure function of (point, sample) over an oracle.

    Attributes:
        cost: What one call costs, in words.
        needs_path: Whether it differentiates through the lower loop.
        splits: Whether its estimates are linear in the samples, part by part (SAGA needs that).
    """

    cost: ClassVar[str]
    needs_path: ClassVar[bool]
    splits: ClassVar[bool]

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate of grad F at the point."""
        ...


@runtime_checkable
class Responding(Protocol):
    """An estimator with an approximation P of H^{-1}, which also gives the response of y to a move of x."""

    def respond(self, oracle: Oracle, point: Point, sample: Sample, direction: Vector, memory: object = None) -> Vector:
        """Return P C^T d: how y*(x) answers to a move of x by -d."""
        ...


def descend(
    oracle: Oracle, x: Vector, y: Vector, steps: int, step: float, sample: Sample
) -> tuple[Vector, tuple[Visit, ...]]:
    """Return y after `steps` plain lower steps of one size, and the path there, for estimators that unroll it.

    Args:
        oracle: The losses.
        x: Upper variable.
        y: Lower variable at the start.
        steps: Number of steps.
        step: Their size.
        sample: The sample of all of them.

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: y[0].sum(), lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> y, path = descend(oracle, (torch.tensor([4.0]),), (torch.tensor([0.0]),), 2, 0.25, Sample())
    >>> y, len(path)
    ((tensor([1.5000]),), 2)
    """
    path: list[Visit] = []
    for _ in range(steps):
        path.append(Visit(y, step, sample))
        y = add(y, oracle.lower_gradients(x, y, sample).lower, -step)
    return y, tuple(path)
