"""Projections onto convex sets, for upper variables that are constrained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, TensorError
from ..evaluation import foreach
from ..evaluation.guard import Guard
from ..evaluation.vectors import inner
from ..policies import validation

__all__ = ["Ball", "Box", "Projection", "Section", "Simplex", "as_projection"]

Projection = Callable[[Sequence[Tensor]], Any]
"""Moves the tensors, in place, to the nearest point of a convex set."""


@dataclass(frozen=True)
class Box:
    """The box low <= x <= high, elementwise.

    Args:
        low: Lower end; -inf for none.
        high: Upper end, above `low`; inf for none.

    Raises:
        OptionError: The box is empty.

    >>> x = torch.tensor([-2.0, 0.5, 3.0])
    >>> Box(0.0, 1.0)([x]); x
    tensor([0.0000, 0.5000, 1.0000])
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Validate the ends."""
        if not (isinstance(self.low, Real) and isinstance(self.high, Real) and self.low < self.high):
            raise OptionError(f"Box(low={self.low!r}, high={self.high!r}): the ends must be numbers, low below high")

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Project in place."""
        for x in tensors:
            most = torch.finfo(x.dtype).max
            x.clamp_(*(end if abs(end) <= most else math.copysign(math.inf, end) for end in (self.low, self.high)))


@dataclass(frozen=True)
class Ball:
    """The ball ||x|| <= radius. The norm is Euclidean, over all tensors together.

    Args:
        radius: Radius, > 0.

    Raises:
        OptionError: radius is not a positive number.

    >>> x = torch.tensor([3.0, 4.0])
    >>> Ball(1.0)([x]); x
    tensor([0.6000, 0.8000])
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        """Validate the radius."""
        validation.positive("Ball", "radius", self.radius, below_infinity=True)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Project in place."""
        _scale_to(tensors, self.radius)


@dataclass(frozen=True)
class Simplex:
    """The simplex: x >= 0, with sum `total` along the last dimension. The projection is Euclidean.

    Args:
        total: Sum, > 0.

    Raises:
        OptionError: total is not positive.
        TensorError: A tensor that is projected has no dimension.

    >>> x = torch.tensor([0.5, 0.8, -1.0])
    >>> Simplex()([x]); x
    tensor([0.3500, 0.6500, 0.0000])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        """Validate the sum."""
        validation.positive("Simplex", "total", self.total, below_infinity=True)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Project in place: x <- max(x - t, 0), where t gives the sum."""
        if any(x.dim() == 0 for x in tensors):
            raise TensorError(
                f"Simplex(total={self.total:g}): a tensor to be projected has shape (), and the sum is taken along the "
                "last dimension; give it one, e.g. by torch.zeros(3) in the place of three numbers"
            )
        for x in tensors:
            if x.numel() == 0:
                continue
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide - wide.amax(-1, keepdim=True)  # changes nothing but roundings: the largest is always kept
            Box(-self.total)([wide])  # nor does this: what is further below the largest never is, and sums stay finite
            ordered = wide.sort(dim=-1, descending=True).values
            ranks = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=wide.dtype)
            thresholds = (ordered.cumsum(-1) - self.total) / ranks
            kept = (ordered > thresholds).sum(-1, keepdim=True).clamp_(min=1)  # the largest, also of NaNs
            x.copy_((wide - thresholds.gather(-1, kept - 1)).clamp_(min=0.0))


@dataclass(frozen=True)
class InPlace:
    """A projection by the user, watched for the usual mistake: returning the projected tensors."""

    project: Projection

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Project in place.

        Raises:
            OptionError: The callable returned tensors of its own.
        """
        returned = self.project(tensors)
        listed = returned if isinstance(returned, (list, tuple)) else [returned]
        own = {id(p) for p in tensors}
        if any(isinstance(t, Tensor) and id(t) not in own for t in listed):
            raise OptionError(
                f"project={self.project!r} returned new tensors: project must change the tensors of the list that it "
                "is given in place, e.g. lambda tensors: [t.clamp_(0, 1) for t in tensors]"
            )


@dataclass(frozen=True)
class Section:
    """A convex set for a list of tensors of which some stay as they are (frozen, without a hypergradient, lr of 0).

    The others are projected onto what is then left to them. A callable is given all tensors, and what it did to those
    that stay is undone, which is that projection where it treats tensors one by one.

    Args:
        project: The projection for all tensors.
        moving: Which of them move.
    """

    project: Projection
    moving: tuple[bool, ...]

    @classmethod
    def of(
        cls, project: Projection, params: Sequence[Tensor], active: Sequence[Tensor], factors: Sequence[float]
    ) -> Section:
        """Return it for parameters of which the active ones move, by their factor of a step each."""
        moving = {id(p) for p, factor in zip(active, factors, strict=True) if factor != 0.0}
        return cls(project, tuple(id(p) in moving for p in params))

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Project in place."""
        moving = [t for t, moves in zip(tensors, self.moving, strict=True) if moves]
        staying = [t for t, moves in zip(tensors, self.moving, strict=True) if not moves]
        if not staying:
            self.project(tensors)
        elif isinstance(self.project, (Box, Simplex)):
            self.project(moving)
        elif isinstance(self.project, Ball):
            radius, taken = self.project.radius, _norm(staying)
            _scale_to(moving, math.sqrt(max(0.0, radius - taken)) * math.sqrt(radius + taken))
        else:
            saved = [t.detach().clone() for t in staying]
            try:
                self.project(tensors)
            finally:
                foreach.copy_([t.detach() for t in staying], saved)

    def enter(self, guard: Guard, tensors: Sequence[Tensor]) -> None:
        """Project the point that a step starts from, to which its trials then go back."""
        if any(self.moving):
            before = guard.copy()
            self(tensors)
            if not all(map(torch.equal, tensors, before)):
                guard.rebase()


def _norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm over all tensors; of entries of which squares leave the dtype, too."""
    largest = max((float(x.detach().abs().max()) for x in tensors if x.numel()), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    scaled = [x.detach() / largest for x in tensors]
    return largest * math.sqrt(float(inner(scaled, scaled)))


def _scale_to(tensors: Sequence[Tensor], radius: float) -> None:
    norm = _norm(tensors)
    if norm > radius:
        for x in tensors:
            x.mul_(radius / norm)


def as_projection(owner: str, project: Any) -> Projection | None:
    """Return the option as a callable, or raise."""
    if project is None or isinstance(project, (Ball, Box, Simplex)):
        return project
    if callable(project) and not isinstance(project, type):
        return InPlace(project)
    raise OptionError(
        f"{owner}(project={project!r}): project must be Box(low, high), Ball(radius), Simplex(total), or a "
        "callable that moves a list of tensors, in place, into a convex set"
    )
