"""Rules for lambda, the weight of the lower loss in f + lambda g."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..evaluation.vectors import add, dot
from ..hypergradient.estimate import Point
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..policies import validation

__all__ = ["Ascent", "Balance", "Growth", "Multiplier"]


class Multiplier(Protocol):
    """A rule for lambda.

    Attributes:
        initial: lambda_0.
    """

    @property
    def initial(self) -> float:
        """lambda_0."""
        ...

    def before(self, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda for the step of x at this point."""
        ...

    def after(self, k: int, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda of the next iteration; `point` is where x was stepped from in iteration k."""
        ...


@dataclass(frozen=True)
class Growth:
    """lambda_{k+1} = min{lambda_k + increment (k+1)^-exponent, largest}: F2SA, and V-PBGD's ramp.

    Args:
        initial: lambda_0 >= 0; F2SA needs f + lambda g convex in y, which holds for lambda > L_f / mu.
        increment: At or above 0.
        exponent: At or above 0.
        largest: Where it stops; inf: nowhere.

    Raises:
        OptionError: An option is out of range.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> start = torch.tensor([4.0]), torch.tensor([4.0])
    >>> *_, last = methods.run("f2sa", problem, *start, iterations=3, multiplier=Growth(increment=0.5))
    >>> round(last.multiplier, 2)
    2.0
    """

    initial: float = 1.0
    increment: float = 0.1
    exponent: float = 0.0
    largest: float = math.inf

    def __post_init__(self) -> None:
        """Validate the options."""
        for name in ("initial", "increment", "exponent"):
            validation.non_negative("Growth", name, getattr(self, name))
        validation.positive("Growth", "largest", self.largest)

    def before(self, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda_k."""
        return point.multiplier

    def after(self, k: int, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda_{k+1}."""
        return min(point.multiplier + self.increment * float((k + 1) ** -self.exponent), self.largest)


@dataclass(frozen=True)
class Balance:
    """lambda = max{eta ||dq||^2 - <df, dq>, 0} / ||dq||^2, and 0 where dq = 0: Liu et al., 2022, arXiv 2209.08709.

    q = g(x, y) - g(x, z), dq = (g_x(x, y) - g_x(x, z), g_y(x, y)): the joint direction df + lambda dq then decreases q.

    Args:
        eta: At or above 0.
        initial: lambda_0 >= 0.

    Raises:
        OptionError: An option is out of range.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> start = torch.tensor([4.0]), torch.tensor([4.0])
    >>> *_, last = methods.run("bome", problem, *start, iterations=3, multiplier=Balance(eta=0.1))
    >>> round(last.multiplier, 2)
    2.32
    """

    eta: float = 0.5
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Validate eta."""
        validation.non_negative("Balance", "eta", self.eta)

    def before(self, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda at this point."""
        partials = oracle.upper_gradients(point.x, point.y, sample)[1]
        here = oracle.lower_gradients(point.x, point.y, sample, of="xy")
        there = oracle.lower_gradients(point.x, point.z, sample, of="x").upper
        q_x = add(here.upper, there, -1.0)
        squares = dot(q_x, q_x) + dot(here.lower, here.lower)
        aligned = dot(partials.upper, q_x) + dot(partials.lower, here.lower)
        return max(self.eta * squares - aligned, 0.0) / squares if squares > 0.0 else 0.0

    def after(self, k: int, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda unchanged."""
        return point.multiplier


@dataclass(frozen=True)
class Ascent:
    """lambda <- max{lambda + step (g(x, y) - v_a(x)), 0}, v_a(x) = g(x, z) + a_1 ||z||^2 / 2 + a_2: the lecture's (29).

    Args:
        step: > 0.
        ridge: a_1 >= 0, that of `SecondLower`.
        slack: a_2 >= 0.
        initial: lambda_0 >= 0.

    Raises:
        OptionError: An option is out of range.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> start = torch.tensor([4.0]), torch.tensor([4.0])
    >>> *_, last = methods.run("primal-dual", problem, *start, iterations=3, multiplier=Ascent(step=0.5))
    >>> round(last.multiplier, 2)
    1.17
    """

    step: float = 0.1
    ridge: float = 1e-3
    slack: float = 1e-3
    initial: float = 1.0

    def __post_init__(self) -> None:
        """Validate the options."""
        validation.positive("Ascent", "step", self.step, below_infinity=True)
        for name in ("ridge", "slack", "initial"):
            validation.non_negative("Ascent", name, getattr(self, name))

    def before(self, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda_k."""
        return point.multiplier

    def after(self, k: int, oracle: Oracle, point: Point, sample: Sample) -> float:
        """Return lambda_{k+1}; the two values of g are by-products of the gradients."""
        here = oracle.lower_gradients(point.x, point.y, sample, of="xy").loss
        there = oracle.lower_gradients(point.x, point.z, sample, of="x").loss
        value = float(there) + 0.5 * self.ridge * dot(point.z, point.z) + self.slack
        following = point.multiplier + self.step * (float(here) - value)
        return max(following, 0.0) if math.isfinite(following) else point.multiplier
