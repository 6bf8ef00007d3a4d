"""Derivatives through the lower loop y_{t+1} = y_t - b_t grad_y g(x, y_t): Franceschi et al., 2017, arXiv 1703.01785.

With A_t = I - b_t H_t and B_t = -b_t C_t^T, Z_{t+1} = A_t Z_t + B_t is dy_{t+1}/dx from Z_0 = 0, and
h = f_x + Z_T^T f_y. The loop is `Point.path`, with the step sizes that were taken (a search's are held fixed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from adaptive_bilevel.policies.validation import count

from ..evaluation.vectors import Vector, add, dot, zeros_like
from .dense import flat, shaped
from .estimate import Estimate, Point
from .oracle import Oracle
from .sample import Sample

__all__ = ["Unroll", "UnrollForward"]


@final
@dataclass(frozen=True)
class Unroll:
    """Reverse mode: the adjoint of the last `last` lower steps (all of them by default).

    From a = f_y and h = f_x, backwards over t: h <- h - b_t C_t a, then a <- a - b_t H_t a. Costs one gradient of f,
    and one HVP and one JVP per step; the T iterates are kept.

    Args:
        last: K of truncated unrolling; None: all steps. From y*(x) this is the Neumann sum of K - 1 with scale b.

    Raises:
        OptionError: An option is out of range.

    >>> from .estimate import descend
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, sample = (torch.tensor([4.0]),), Sample()
    >>> y, path = descend(oracle, x, (torch.tensor([0.0]),), 2, 0.25, sample)
    >>> Unroll()(oracle, Point(x, y, path=path), sample).hypergradient
    (tensor([0.1875]),)
    """

    last: int | None = None

    cost: ClassVar[str] = "1 gradient of f; 1 HVP and 1 JVP per lower step"
    needs_path: ClassVar[bool] = True
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the truncation."""
        if self.last is not None:
            count("Unroll", "last", self.last)

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        h, adjoint = partials.upper, partials.lower
        visits = point.path if self.last is None else point.path[-self.last :]
        for visit in reversed(visits):
            mixed, curved = oracle.pull_back(point.x, visit.y, visit.sample, adjoint)
            h, adjoint = add(h, mixed, -visit.step), add(adjoint, curved, -visit.step)
        return Estimate(h, None, loss, partials)


@final
@dataclass(frozen=True)
class UnrollForward:
    """Forward mode: Z column by column; needs no iterates but d_x times the products. For small upper variables.

    >>> from .estimate import descend
    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, sample = (torch.tensor([4.0]),), Sample()
    >>> y, path = descend(oracle, x, (torch.tensor([0.0]),), 2, 0.25, sample)
    >>> UnrollForward()(oracle, Point(x, y, path=path), sample).hypergradient
    (tensor([0.1875]),)
    """

    cost: ClassVar[str] = "1 gradient of f; d_x HVPs and d_x JVPs per lower step"
    needs_path: ClassVar[bool] = True
    splits: ClassVar[bool] = False

    def __call__(self, oracle: Oracle, point: Point, sample: Sample) -> Estimate:
        """Return the estimate."""
        loss, partials = oracle.upper_gradients(point.x, point.y, sample)
        x = flat(point.x)
        basis = [shaped(e, point.x) for e in torch.eye(x.numel(), dtype=x.dtype, device=x.device)]
        Z: list[Vector] = [zeros_like(point.y)] * len(basis)
        for visit in point.path:
            Z = [
                add(z, oracle.push_forward(point.x, visit.y, visit.sample, e, z), -visit.step)
                for z, e in zip(Z, basis, strict=True)
            ]
        through = torch.tensor([dot(z, partials.lower) for z in Z], dtype=x.dtype, device=x.device)
        return Estimate(add(partials.upper, shaped(through, point.x)), None, loss, partials)
