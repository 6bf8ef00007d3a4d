"""Directions: from the sampled gradients of a variable to what its step size multiplies.

| direction | d_k | searched along |
|---|---|---|
| `Plain` | g_k | g_k |
| `Momentum` | weight d_{k-1} + (1 - weight) g_k, the lecture's (20) | g_k |
| `Adam` | A^{-1} m_k, bias-corrected | A^{-1} g_k |
| `Storm` | g_k + weight (d_{k-1} - g_{k-1}), g_{k-1} on the sample of g_k: SUSTAIN, the lecture's (21), (22) | no |
| `Spider` | the same with weight 1, restarted on a large batch every `period` iterations: VRBO, SRBA | no |
| `Saga` | g_i - table_i + mean of the table: SABA | no |

The last three are not gradients of the sampled loss. A search or a Polyak step along them raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypedDict

from ..errors import OptionError
from ..evaluation.vectors import Vector, add, scale
from ..hypergradient.estimate import Point
from ..hypergradient.sample import Sample
from ..optim import direction as core
from ..optim.state import RoleState, advanced
from ..policies import validation
from .fields import Gradient

__all__ = ["Adam", "Directed", "Direction", "DirectionState", "Momentum", "Plain", "Saga", "Sampled", "Spider", "Storm"]

Weight = float | Callable[[int], float]
DirectionState: TypeAlias = dict[str, Any]  # plain data: tensors and numbers, in dicts and tuples


class Sampled(NamedTuple):
    """The sampled gradient of a variable, and how to take it elsewhere.

    Attributes:
        gradient: The gradient.
        point: Where it was taken.
        sample: On which sample.
        again: Takes it at another point, or on another sample.
        full: The sample of all data; None if it is not known.
        iteration: k.
    """

    gradient: Gradient
    point: Point
    sample: Sample
    again: Callable[[Point, Sample], Vector]
    full: Sample | None
    iteration: int


class Directed(NamedTuple):
    """A direction.

    Attributes:
        gradient: What the slope is taken with.
        along: The direction that is searched along; the slope is <gradient, along>.
        stepped: The direction that is stepped along.
        state: The direction's state after the step, plain data.
    """

    gradient: Vector
    along: Vector
    stepped: Vector
    state: DirectionState


class Direction(Protocol):
    """A direction rule: frozen options, and a pure function of (state, sampled gradient); the first state is {}.

    Attributes:
        certifies: Whether the searched direction descends on the sampled loss.
        second_point: Whether it takes the gradient at a second point.
    """

    certifies: ClassVar[bool]
    second_point: ClassVar[bool]

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the direction at this gradient."""
        ...


@dataclass(frozen=True)
class Plain:
    """d = g."""

    certifies: ClassVar[bool] = True
    second_point: ClassVar[bool] = False

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the gradient."""
        g = sampled.gradient.total
        return Directed(g, g, g, state)


@dataclass(frozen=True)
class Momentum:
    """d_k = weight d_{k-1} + (1 - weight) g_k, d_0 = g_0.

    Args:
        weight: Weight of the old direction, in [0, 1), a number or a function of k.

    Raises:
        OptionError: An option is out of range.
    """

    weight: Weight = 0.9

    certifies: ClassVar[bool] = True
    second_point: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the weight."""
        _check_weight("Momentum", self.weight)

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the average to step along, the gradient to search along."""
        g = sampled.gradient.total
        w = weight_at(self.weight, sampled.iteration)
        d = add(scale(state["direction"], w), g, 1.0 - w) if state else g
        return Directed(g, g, d, {"direction": d})


@dataclass(frozen=True)
class Adam:
    """Adam's direction, both moments bias-corrected, eps outside the root (as `torch.optim.Adam`).

    Args:
        betas: Decay of the first and of the second moment, in [0, 1).
        eps: Added to the root.

    Raises:
        OptionError: An option is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    certifies: ClassVar[bool] = True
    second_point: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the options."""
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise OptionError(f"Adam(betas={self.betas!r}): betas must be two numbers in [0, 1)")
        validation.non_negative("Adam", "eps", self.eps)

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return A^{-1} m to step along, A^{-1} g to search along."""
        g = sampled.gradient.total
        role, before = core.Adam(self.betas, self.eps), RoleState(each=state.get("each") or [{} for _ in g])
        gradient = core.Gradient(list(g), list(g), [1.0] * len(g))
        descent = role.propose(gradient, before)
        assert descent.step is not None
        after = {"each": advanced(before, role.commit(gradient, descent, before)).each}
        return Directed(g, tuple(descent.precondition(g)), tuple(descent.step), after)


@dataclass(frozen=True)
class Storm:
    """d_k = g(p_k; s_k) + weight (d_{k-1} - g(p_{k-1}; s_k)), d_0 = g_0: one sample, two points.

    Args:
        weight: Weight of the old direction (eta of (21)), in [0, 1), a number or a function of k.

    Raises:
        OptionError: An option is out of range.
    """

    weight: Weight = 0.9

    certifies: ClassVar[bool] = False
    second_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the weight."""
        _check_weight("Storm", self.weight)

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the recursive estimate."""
        return recursive(state, sampled, weight_at(self.weight, sampled.iteration))


@dataclass(frozen=True)
class Spider:
    """d_k = d_{k-1} + g(p_k; s_k) - g(p_{k-1}; s_k); at k = 0, period, 2 period, ... the gradient on all data.

    If the batches do not give all data, it restarts with the sampled gradient.

    Args:
        period: Number of iterations between restarts, at least 1.

    Raises:
        OptionError: An option is out of range.
    """

    period: int = 10

    certifies: ClassVar[bool] = False
    second_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the period."""
        validation.count("Spider", "period", self.period)

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the recursive estimate."""
        if state and (sampled.iteration % self.period or state["begun"] == sampled.iteration):
            directed = recursive(state, sampled, 1.0)
            return directed._replace(state={**directed.state, "begun": state["begun"]})
        g = sampled.gradient.total if sampled.full is None else sampled.again(sampled.point, sampled.full)
        return Directed(g, g, g, {"direction": g, "point": where(sampled.point), "begun": sampled.iteration})


class SagaTable(TypedDict):
    """What `Saga` keeps of one level.

    Attributes:
        table: The last gradient of each summand.
        sum: Their sum; None: there is none yet.
    """

    table: dict[Hashable, Vector]
    sum: Vector | None


@dataclass(frozen=True)
class Saga:
    """d = g_i - table_i + mean(table), for the upper and the lower sample apart; the table then holds g_i.

    A new sample enters the table without a correction. The memory is one gradient for each summand of either level.
    """

    certifies: ClassVar[bool] = False
    second_point: ClassVar[bool] = False

    def __call__(self, state: DirectionState, sampled: Sampled) -> Directed:
        """Return the corrected gradient.

        Raises:
            OptionError: The batches do not say which summand they are.
        """
        total: Vector | None = None
        after: DirectionState = dict(state)
        gradient, sample = sampled.gradient, sampled.sample
        for level, part, key in (
            ("upper", gradient.upper, sample.upper_id),
            ("lower", gradient.lower, sample.lower_id),
        ):
            if part is None:
                continue
            corrected, after[level] = _corrected(state.get(level, {"table": {}, "sum": None}), part, key)
            total = corrected if total is None else add(total, corrected)
        assert total is not None
        return Directed(total, total, total, after)


def _corrected(known: SagaTable, part: Vector, key: Hashable) -> tuple[Vector, SagaTable]:
    if key is None:
        raise OptionError(
            "direction=Saga(): the batches do not say which summand they are, so no table can be kept; pass "
            "batches=methods.Minibatches(..., blocks=True), or Pair(upper, lower, upper_id, lower_id) items"
        )
    table, total = known["table"], known["sum"]
    if total is None or key not in table:
        total = part if total is None else add(total, part)
        return part, {"table": {**table, key: part}, "sum": total}
    change = add(part, table[key], -1.0)
    corrected = add(change, total, 1.0 / len(table))
    return corrected, {"table": {**table, key: part}, "sum": add(total, change)}


def recursive(state: DirectionState, sampled: Sampled, weight: float) -> Directed:
    """Return g(p_k; s_k) + weight (d_{k-1} - g(p_{k-1}; s_k)), and g(p_0; s_0) at first."""
    g = sampled.gradient.total
    if state:
        old = sampled.again(Point(**state["point"]), sampled.sample)
        g = add(g, add(state["direction"], old, -1.0), weight)
    return Directed(g, g, g, {"direction": g, "point": where(sampled.point)})


def where(point: Point) -> dict[str, object]:
    """Return the point as plain data, without the path that led there."""
    return {**point._asdict(), "path": (), "memory": None}


def weight_at(weight: Weight, k: int) -> float:
    """Return the weight of iteration k."""
    return float(weight(k)) if callable(weight) else weight


def _check_weight(owner: str, weight: object) -> None:
    if not callable(weight) and not (isinstance(weight, (int, float)) and 0.0 <= weight < 1.0):
        raise OptionError(f"{owner}(weight={weight!r}): weight must be a number in [0, 1), or a function of k")
