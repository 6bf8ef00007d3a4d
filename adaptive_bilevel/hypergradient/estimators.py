"""Implicit estimators: h = f_x - C v with v an approximation of H^{-1} f_y (Fan et al., 2023, eq. (2), sign corrected).

`Implicit` takes any linear solver: `Exact`, `CG`, `Neumann` (the sum of SHIA and stocBiO, or the random term of HIA,
BSA and TTSA), `Identity` (T1-T2). `Amortised` uses the v that the method itself tracks. `Averaged` keeps
variance-reduced estimates of H and C as STABLE does.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypedDict, cast, final

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies.validation import fraction

from ..evaluation.vectors import Vector, add, negate, zeros_like
from .dense import columns, dense_solve, flat, shaped
from .estimate import Estimate, Point
from .lanczos import Lanczos
from .oracle import Oracle
from .sample import Sample
from .solution import LinearSolver, Solution, report

__all__ = ["Amortised", "Averaged", "Implicit", "linear_residual"]


@final
@dataclass(frozen=True)
class Implicit:
    """h = f_x - C v, v = P f_y with the solver's approximation P of H^{-1}.

    Costs one gradient of f, the solver's HVPs and one JVP. With ``CG(warm_start=True)`` the solve starts from
    `Point.v`. A solver that resamples (``Neumann(random=True)``) takes its products on `Sample.products` in turn.

    Raises:
        OptionError: The solver has no method `solve`.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> Implicit()(oracle, Point((torch.tensor([4.0]),), (torch.tensor([2.0]),)), Sample()).hypergradient
    (tensor([0.5000]),)
    """

    solver: LinearSolver = Lanczos()  # noqa: RUF009 - frozen options

    cost: ClassVar[str] = "1 gradient of f, the solver's HVPs, 1 JVP"
    needs_path: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the solver."""
        if isinstance(self.solver, type) or not callable(getattr(self.solver, "solve", None)):
            raise OptionError(
                f"Implicit(solver={self.solver!r}): solver must be Lanczos(...), CG(...), Neumann(...), "
                "Identity(...) or Exact()"
            )

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate; `Estimate.v` is v."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        initial = point.v if self.solver.warm_start and point.v else None
        inverse = None
        if isinstance(self.solver, Lanczos):
            inverse = self.solver.basis(lambda u: oracle.hvp(point.x, point.y, sample, u), partials.lower)
            solution = inverse.solution
        else:
            solution = self._solve(oracle, point, sample, partials.lower, initial)
        h = add(partials.upper, oracle.cross_vjp(point.x, point.y, sample, solution.tensors), -1.0)
        report(self.solver, solution, h)
        return Estimate(h, None, loss, partials, solution.tensors, inverse=inverse)

    def respond(self, oracle: Oracle, point: Point, sample: Sample, direction: Vector, memory: object = None) -> Vector:
        """Return P C^T d: how y*(x) answers to a move of x by -d, with the same inverse P."""
        push = oracle.cross_jvp(point.x, point.y, sample, direction)
        solution = self._solve(oracle, point, sample, push, None)
        report(self.solver, solution, solution.tensors)
        return solution.tensors

    def _solve(self, oracle: Oracle, point: Point, sample: Sample, rhs: Vector, initial: Vector | None) -> Solution:
        batches = itertools.cycle(sample.products or (sample.lower,))

        def product(vector: Vector) -> Vector:
            drawn = sample._replace(lower=next(batches)) if self.solver.resamples and sample.products else sample
            return oracle.hvp(point.x, point.y, drawn, vector)

        with seeded(sample.seed) if self.solver.resamples else contextlib.nullcontext():
            return self.solver.solve(product, rhs, initial)


@final
@dataclass(frozen=True)
class Amortised:
    """h = f_x - C v with the v that the method tracks itself (SOBA, AmIGO, FSLA, S-TFBO): no solve at all.

    Its steps are v <- v - s (H v - f_y); see `linear_residual`. Costs one gradient of f and one JVP.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> point = Point((torch.tensor([4.0]),), (torch.tensor([2.0]),), v=(torch.tensor([0.4]),))
    >>> Amortised()(oracle, point, Sample()).hypergradient
    (tensor([0.4000]),)
    """

    cost: ClassVar[str] = "1 gradient of f, 1 JVP"
    needs_path: ClassVar[bool] = False
    splits: ClassVar[bool] = True

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        v = point.v or zeros_like(point.y)
        return Estimate(partials.upper, negate(oracle.cross_vjp(point.x, point.y, sample, v)), loss, partials, v)


def linear_residual(oracle: Oracle, point: Point, sample: Sample) -> tuple[Vector, Vector]:
    """Return (-f_y, H v), whose sum is the gradient H v - f_y of R(v) = <v, H v> / 2 - <v, f_y>.

    Args:
        oracle: The losses.
        point: x, y and v. An empty v is zero.
        sample: The sample of both parts.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> point = Point((torch.tensor([4.0]),), (torch.tensor([2.0]),), v=(torch.tensor([0.4]),))
    >>> linear_residual(oracle, point, Sample())
    ((tensor([-1.]),), (tensor([0.8000]),))
    """
    partials = oracle.upper_gradients(point.x, point.y, sample)[1]
    return negate(partials.lower), oracle.hvp(point.x, point.y, sample, point.v or zeros_like(point.y))


class AveragedMatrices(TypedDict):
    """What `Averaged` carries from one evaluation to the next.

    Attributes:
        H: H_k.
        C: C_k.
        x: Where they were evaluated.
        y: Likewise.
    """

    H: Tensor
    C: Tensor
    x: Vector
    y: Vector


@final
@dataclass(frozen=True)
class Averaged:
    """h = f_x - C_k H_k^{-1} f_y with recursively averaged dense matrices, as STABLE keeps them.

    H_k = H(p_k; s) + weight (H_{k-1} - H(p_{k-1}; s)), and likewise C_k, both points on the same sample s. On a
    deterministic problem they are H and C. `Estimate.memory` carries them. For small variables: d_y HVPs and d_y JVPs
    per point.

    Args:
        weight: Weight of the old matrices, in (0, 1).

    Raises:
        OptionError: The weight is out of range.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> point = Point((torch.tensor([4.0]),), (torch.tensor([2.0]),))
    >>> Averaged(0.5)(oracle, point, Sample()).hypergradient
    (tensor([0.5000]),)
    """

    weight: float = 0.9

    cost: ClassVar[str] = "1 gradient of f; d_y HVPs and d_y JVPs at this and at the last point"
    needs_path: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the weight."""
        fraction("Averaged", "weight", self.weight)

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        H, C = _matrices(oracle, point.x, point.y, sample)
        if point.memory is not None:
            old = cast(AveragedMatrices, point.memory)
            old_H, old_C = _matrices(oracle, old["x"], old["y"], sample)
            H = H + self.weight * (old["H"] - old_H)
            C = C + self.weight * (old["C"] - old_C)
        v = dense_solve(H, flat(partials.lower).to(H.dtype))
        h = add(partials.upper, shaped(C @ v, point.x), -1.0)
        memory: AveragedMatrices = {"H": H, "C": C, "x": point.x, "y": point.y}
        return Estimate(h, None, loss, partials, shaped(v, point.y), memory)

    def respond(self, oracle: Oracle, point: Point, sample: Sample, direction: Vector, memory: object = None) -> Vector:
        """Return H_k^{-1} C_k^T d with the matrices of `memory`, an estimate's."""
        assert memory is not None
        averaged = cast(AveragedMatrices, memory)
        H, C = averaged["H"], averaged["C"]
        return shaped(dense_solve(H, C.T @ flat(direction).to(H.dtype)), point.y)


def _matrices(oracle: Oracle, x: Vector, y: Vector, sample: Sample) -> tuple[Tensor, Tensor]:
    H = columns(lambda v: oracle.hvp(x, y, sample, v), y)
    C = columns(lambda v: oracle.cross_vjp(x, y, sample, v), y)
    dtype = torch.promote_types(H.dtype, C.dtype)
    return H.to(dtype), C.to(dtype)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's default generator on the CPU give the numbers of a seed, and put it back."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
