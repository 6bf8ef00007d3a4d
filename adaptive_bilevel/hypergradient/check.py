"""A check of hypergradients by finite differences through a re-solved lower problem.

A wrong hypergradient is a common and silent bug: with a wrong sign of the implicit term, a missing factor or a detached
tensor, training goes on, to another point. This module measures; `verdict` names the mistake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError, OptionError, TensorError
from adaptive_bilevel.policies.validation import choice, count, fraction, positive

from ..evaluation.opened import closing
from ..evaluation.parts import gathered, scattered
from ..evaluation.processes import Group, mean
from ..evaluation.vectors import Vector, add, dot, rounding
from .cg import CG
from .curvature import unconnected
from .difference_products import LowerLoss
from .implicit import upper_part
from .lower_solve import resolve
from .products import PRODUCTS, Sampled, curvature_of, refuse_products
from .trees import Closure, Tree, check_callable, check_levels, flatten, guarded
from .verdict import CheckReport, DirectionCheck, Measurements, Verdict, diagnose

if TYPE_CHECKING:
    from adaptive_bilevel.evaluation.guard import Guard

__all__ = ["CheckReport", "DirectionCheck", "Verdict", "check"]

COORDINATES = 6  # up to this many numbers in x, every coordinate is measured and nothing is left to chance


@closing
def check(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Tree,
    lower: Tree,
    *,
    gradient: Tree | None = None,
    directions: int = 2,
    tolerance: float = 0.1,
    step: float | None = None,
    max_iterations: int = 50,
    seed: int = 0,
    process_group: Group = None,
    products: str = "auto",
) -> CheckReport:
    """Compare a hypergradient with finite differences of ``F(x) = f(x, y*(x))``, and name the mistake if they differ.

    For each direction d, Newton's method solves the lower problem from the present y at x +- e d and x +- 2 e d. The
    difference ``(F(x + e d) - F(x - e d)) / (2 e)`` is compared with <gradient, d>. If x has at most 6 entries, the
    directions are the coordinates. Otherwise they are the gradient, the reference (`implicit` at the re-solved point),
    its direct part, and random directions, made orthonormal. The cost is that of a few dozen lower solves, so the check
    is for a test or for the first iteration.

    Parameters, ``.grad``, buffers and torch's random state are restored bitwise, also after exceptions.

    Args:
        upper_closure: Returns f(x, y). It is called many times.
        lower_closure: Returns g(x, y), strongly convex in y. It is called many times. Both closures must return the
            same value for the same parameters: fix the batch, and set dropout to eval mode.
        upper: The tensors of x: leaves, as for `implicit`.
        lower: The tensors of y, where the hypergradient was computed.
        gradient: The hypergradient to check, arranged like ``upper``; their ``.grad`` by default.
        directions: Number of random directions, at least 1.
        tolerance: Relative error up to which the gradient passes, in (0, 1). A hypergradient by `CG` with its default
            tolerance .1 has an error of a few per cent.
        step: The length e, above 0. By default ``eps^(1/3) max(1, ||x||)``, with the rounding unit eps of the dtype.
        max_iterations: Maximal number of Newton steps in each lower solve, at least 1.
        seed: Seed of the random directions. They do not use torch's global generator.
        process_group: As for `implicit`.
        products: As for `implicit`.

    Raises:
        HypergradientError: There is no gradient to check, or its shapes are not those of ``upper``.
        ClosureError: As for `implicit`.
        TensorError: As for `implicit`; or a tensor is not a leaf.
        SolverError: As for `implicit`.
        OptionError: An option is outside its range.

    >>> import torch
    >>> x = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    >>> y = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)  # y*(x) = x / 2
    >>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
    >>> g = lambda: (y**2 - x * y).sum()
    >>> check(f, g, [x], [y], gradient=[torch.tensor([-0.1])]).sentence
    'The implicit term has the wrong sign: the gradient is f_x + C v, right is f_x - C v.'
    """
    count("check", "directions", directions)
    count("check", "max_iterations", max_iterations)
    fraction("check", "tolerance", tolerance)
    positive("check", "step", step, optional=True)
    if not isinstance(seed, int):
        raise OptionError(f"check(seed={seed!r}): seed must be a whole number")
    x, _ = flatten(upper, "upper")
    y, _ = flatten(lower, "lower")
    check_levels(x, y)
    check_callable(upper_closure, "upper_closure")
    check_callable(lower_closure, "lower_closure")
    choice("check", "products", products, PRODUCTS)
    refuse_products("check", products, (*x, *y))
    claimed = _claimed(x, gradient)
    moving = [tensor.requires_grad for tensor in x]
    x, claimed = _where(x, moving), _where(claimed, moving)
    y = tuple(tensor for tensor in y if tensor.requires_grad)
    for name, tensors in (("upper", x), ("lower", y)):
        if not all(tensor.is_leaf for tensor in tensors):
            raise TensorError(f"{name} holds a tensor that is no leaf: check() moves tensors in place, pass leaves.")
    options = {"directions": directions, "seed": seed, "step": step, "max_iterations": max_iterations}
    with guarded((*x, *y), process_group, products=products, **options) as guard:
        guard.copy()
        try:
            bench = _Bench(guard, upper_closure, lower_closure, x, y, max_iterations, products)
            return diagnose(_measure(bench, _flat(mean(claimed)), directions, step, seed), tolerance)
        finally:
            guard.undo()


class _Bench:
    """The two losses at whatever point the tensors are put to; all vectors of x are flat, in float64 on the CPU."""

    def __init__(
        self,
        guard: Guard,
        upper_closure: Closure,
        lower_closure: Closure,
        x: Vector,
        y: Vector,
        max_iterations: int,
        products: str,
    ) -> None:
        self.guard, self.x, self.y = guard, x, y
        self._upper_closure, self._lower_closure, self._max_iterations = upper_closure, lower_closure, max_iterations
        self._products, self.origin = products, _flat(x)

    def noise(self) -> float:
        """Return the relative difference of two evaluations of each closure, random state and batches running on."""
        differences = []
        for closure in (self._upper_closure, self._lower_closure):
            first, second = float(self.guard.value(closure)), float(self.guard.value(closure))
            if math.isfinite(first) and math.isfinite(second):
                differences.append(abs(first - second) / max(abs(first), abs(second), 1e-300))
        return max(differences, default=0.0)

    def solve(self) -> float:
        """Move y to the lower solution at the present x and return ||grad_y g|| there."""
        # Every evaluation replays the same random state and buffers, so that F is one function.
        entry = self.guard.entry
        return resolve(
            self._sampled,
            lambda: float(self.guard.value(self._lower_closure, entry)),
            self.y,
            max_iterations=self._max_iterations,
        ).gradient_norm

    def _sampled(self) -> Sampled:
        loss = LowerLoss(self.guard, [(self._lower_closure, self.guard.entry)])
        return curvature_of(self._products, loss, self.x, self.y)

    def value(self, x: Tensor, start: Vector) -> float:
        """Return F at ``x``, the lower solve starting from ``start``."""
        _put(self.x, x)
        with torch.no_grad():
            for tensor, value in zip(self.y, start, strict=True):
                tensor.copy_(value)
        if not math.isfinite(self.solve()):
            return math.nan
        return float(self.guard.value(self._upper_closure, self.guard.entry))

    def parts(self) -> tuple[Tensor, Tensor, float, str]:
        """Return f_x, C H^{-1} f_y and ||grad_y g|| at the present point; last, what to say if x is in no loss."""
        (direct, rhs), reaches, _ = upper_part(
            self.guard, self._upper_closure, self.x, self.y, self._products, self.guard.entry
        )
        curvature = self._sampled().curvature
        size = sum(tensor.numel() for tensor in self.y)
        solution = CG(max_iterations=max(20, min(1000, 4 * size)), tolerance=1e-10).solve(curvature.hvp, rhs)
        implicit = _flat(curvature.cross_vjp(solution.tensors))
        absent = "" if curvature.mixed or reaches else unconnected(reaches)
        return _flat(direct), implicit, _norm(curvature.gradient), absent


def _measure(bench: _Bench, claimed: Tensor, random: int, step: float | None, seed: int) -> Measurements:
    noise = bench.noise()
    direct, implicit, lower_gradient, absent = bench.parts()
    present = tuple(tensor.detach().clone() for tensor in bench.y)
    measured = Measurements(claimed, noise, direct, implicit, lower_gradient, absent)
    unit = max(rounding(bench.x), rounding(bench.y))
    if absent or noise > 64 * unit or not bool(torch.isfinite(torch.cat([claimed, direct, implicit])).all()):
        return measured
    measured.resolved_gradient = bench.solve()
    solution = tuple(tensor.detach().clone() for tensor in bench.y)
    measured.lower_distance = _norm(add(solution, present, -1.0)) / max(_norm(solution), 1e-300)
    measured.solved_direct, measured.solved_implicit, *_ = bench.parts()
    length = (unit ** (1 / 3) * max(1.0, float(bench.origin.norm()))) if step is None else step
    for name, direction in _directions(measured, random, seed):
        near, far = (
            (bench.value(bench.origin + e * direction, solution) - bench.value(bench.origin - e * direction, solution))
            / (2 * e)
            for e in (length, 2 * length)
        )
        check = DirectionCheck(name, float(claimed @ direction), near, abs(near - far))
        measured.add(check, direction)
    return measured


def _directions(measured: Measurements, random: int, seed: int) -> list[tuple[str, Tensor]]:
    """Return orthonormal directions with names; those that add nothing new are left out."""
    size = measured.claimed.numel()
    if size <= COORDINATES:
        return [(f"coordinate {i}", row) for i, row in enumerate(torch.eye(size, dtype=torch.float64))]
    generator = torch.Generator().manual_seed(seed)
    candidates = [
        ("gradient", measured.claimed),
        ("reference", measured.solved_direct - measured.solved_implicit),
        ("direct part", measured.solved_direct),
        *((f"random {i}", torch.randn(size, generator=generator, dtype=torch.float64)) for i in range(random)),
    ]
    found: list[tuple[str, Tensor]] = []
    for name, vector in candidates:
        rest = vector
        for _, other in (*found, *found):  # twice: once leaves rounding of the parallel part
            rest = rest - (rest @ other) * other
        if float(rest.norm()) > 1e-3 * float(vector.norm()):
            found.append((name, rest / rest.norm()))
    return found


def _claimed(x: Sequence[Tensor], gradient: Tree | None) -> Vector:
    if gradient is None:
        if all(tensor.grad is None for tensor in x):
            raise HypergradientError(
                "Every .grad of upper is None: compute the hypergradient first, or pass it as gradient=."
            )
        return tuple(torch.zeros_like(t, requires_grad=False) if t.grad is None else t.grad.detach().clone() for t in x)
    claimed, _ = flatten(gradient, "gradient")
    if [t.shape for t in claimed] != [t.shape for t in x]:
        raise HypergradientError(
            f"gradient has shapes {[tuple(t.shape) for t in claimed]}, upper has {[tuple(t.shape) for t in x]}: "
            "pass one tensor for each of upper."
        )
    return tuple(tensor.detach().clone() for tensor in claimed)


def _where(tensors: Sequence[Tensor], keep: Sequence[bool]) -> Vector:
    return tuple(tensor for tensor, kept in zip(tensors, keep, strict=True) if kept)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([gathered(tensor).to("cpu", torch.float64).reshape(-1) for tensor in tensors])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(dot(tensors, tensors))


def _put(tensors: Sequence[Tensor], values: Tensor) -> None:
    with torch.no_grad():
        for tensor, own in zip(tensors, values.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(scattered(own.reshape(tensor.shape).to(tensor.device), tensor))
