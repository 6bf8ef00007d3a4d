"""Fields: the sampled gradients of y, v, z and x at a point, with their functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from ..evaluation.vectors import Vector, add, dot, scale
from ..hypergradient import ValueFunction
from ..hypergradient.estimate import Estimate, Estimator, Point
from ..hypergradient.estimators import linear_residual
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..policies import validation

__all__ = ["Field", "Gradient", "Hypergradient", "LinearSystem", "LowerLoss", "PenalisedLoss", "SecondLower"]


class Gradient(NamedTuple):
    """A sampled gradient of one variable.

    Attributes:
        upper: Its part on the upper sample (or all of it, where it is not split); None: no such part.
        lower: Its part on the lower sample; None: no such part, or no split.
        loss: Value of the function that it is the gradient of.
        objective: That function of the variable alone, for trials; None: unknown.
        estimate: The estimate that it comes from, of x.
    """

    upper: Vector | None
    lower: Vector | None
    loss: float
    objective: Callable[[Vector], float] | None = None
    estimate: Estimate | None = None

    @property
    def total(self) -> Vector:
        """The gradient."""
        if self.upper is None or self.lower is None:
            only = self.lower if self.upper is None else self.upper
            assert only is not None
            return only
        return add(self.upper, self.lower)


class Field(Protocol):
    """A pure function of (point, sample) over an oracle.

    Attributes:
        cost: What one call costs, in words.
    """

    @property
    def cost(self) -> str:
        """What one call costs, in words."""
        ...

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the sampled gradient at the point."""
        ...


@dataclass(frozen=True)
class LowerLoss:
    """y: grad_y g(x, y).

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y = ((torch.tensor([entry]),) for entry in (4.0, 1.5))
    >>> LowerLoss()(oracle, Point(x, y), Sample()).total
    (tensor([-1.]),)
    """

    cost: ClassVar[str] = "1 gradient of g"

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the gradient."""
        found = oracle.lower_gradients(point.x, point.y, sample)
        return Gradient(None, found.lower, float(found.loss), lambda y: float(oracle.lower_value(point.x, y, sample)))


@dataclass(frozen=True)
class PenalisedLoss:
    """y: grad_y (f + lambda g), the lower level of the value-function methods.

    Args:
        normalise: Scale by min(1 / lambda, 1), as `ValueFunction` does.

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y = ((torch.tensor([entry]),) for entry in (4.0, 1.5))
    >>> PenalisedLoss()(oracle, Point(x, y, multiplier=2.0), Sample()).total
    (tensor([-1.5000]),)
    """

    normalise: bool = False

    cost: ClassVar[str] = "1 gradient of f, 1 gradient of g"

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the gradient."""
        factor = ValueFunction(self.normalise).scaling(point.multiplier)
        f, partials = oracle.upper_gradients(point.x, point.y, sample)
        found = oracle.lower_gradients(point.x, point.y, sample)

        def objective(y: Vector) -> float:
            g = oracle.lower_value(point.x, y, sample)
            return factor * float(oracle.upper_value(point.x, y, sample) + point.multiplier * g)

        return Gradient(
            scale(partials.lower, factor),
            scale(found.lower, factor * point.multiplier),
            factor * float(f + point.multiplier * found.loss),
            objective,
        )


@dataclass(frozen=True)
class LinearSystem:
    """v: H v - f_y, the gradient of R(v) = <v, H v> / 2 - <v, f_y>.

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y, v = ((torch.tensor([entry]),) for entry in (4.0, 1.5, 0.4))
    >>> LinearSystem()(oracle, Point(x, y, v), Sample()).total
    (tensor([0.3000]),)
    """

    cost: ClassVar[str] = "1 HVP (and f_y once per point)"

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the residual."""
        upper, lower = linear_residual(oracle, point, sample)

        def objective(v: Vector) -> float:
            curved = oracle.hvp(point.x, point.y, sample, v)
            return 0.5 * dot(v, curved) + dot(v, upper)

        v = point.v
        return Gradient(upper, lower, 0.5 * dot(v, lower) + dot(v, upper), objective)


@dataclass(frozen=True)
class SecondLower:
    """z: grad_z (g(x, z) + ridge ||z||^2 / 2), whose minimum is the value function v(x), or the smoothed one of (26).

    Args:
        ridge: a_1 >= 0 of (26).

    Raises:
        OptionError: An option is out of range.

    >>> import torch
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y, z = ((torch.tensor([entry]),) for entry in (4.0, 1.5, 1.0))
    >>> SecondLower(ridge=0.1)(oracle, Point(x, y, z=z), Sample()).total
    (tensor([-1.9000]),)
    """

    ridge: float = 0.0

    cost: ClassVar[str] = "1 gradient of g"

    def __post_init__(self) -> None:
        """Validate the ridge."""
        validation.non_negative("SecondLower", "ridge", self.ridge)

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the gradient."""
        found = oracle.lower_gradients(point.x, point.z, sample)

        def regularised(z: Vector, g: float) -> float:
            return g + 0.5 * self.ridge * dot(z, z)

        lower = add(found.lower, point.z, self.ridge) if self.ridge else found.lower
        return Gradient(
            None,
            lower,
            regularised(point.z, float(found.loss)),
            lambda z: regularised(z, float(oracle.lower_value(point.x, z, sample))),
        )


@dataclass(frozen=True)
class Hypergradient:
    """x: the estimate of grad F.

    Args:
        estimator: The estimator.
    """

    estimator: Estimator

    @property
    def cost(self) -> str:
        """What one call costs, in words."""
        return self.estimator.cost

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Gradient:
        """Return the estimate."""
        found = self.estimator(oracle, point, sample)
        return Gradient(found.upper_part, found.lower_part, float(found.loss), None, found)
