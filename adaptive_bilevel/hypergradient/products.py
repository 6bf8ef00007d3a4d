"""How products with second derivatives of the lower loss are taken: by autograd, by differences, or by what works.

| ``products=`` | class | a product with H or C |
|---|---|---|
| "autograd" | `LowerCurvature` | one backward through a kept graph; SolverError where there is no second derivative |
| "difference" | `DifferenceCurvature` | two gradients |
| "auto" | the first; where that raises SolverError, the second from then on, and for these tensors for good; for | |
| | parameters in parts the second | |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, final

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import OptionError, SolverError, warn
from ..evaluation.parts import any_in_parts
from ..evaluation.reductions import agreed
from ..evaluation.vectors import Vector, rounding
from .curvature import LowerCurvature
from .difference_products import DifferenceCurvature, LowerLoss

__all__ = [
    "PRODUCTS",
    "Curvature",
    "Sampled",
    "curvature_of",
    "known_without",
    "refuse_products",
    "remember_without",
    "resumed",
    "say_unresolved",
]

PRODUCTS = ("auto", "autograd", "difference")

_UNRESOLVED = 0.1
"""Relative error above which products by differences are said to be wrong."""

_without: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Lower tensors whose loss has no second derivatives, by the first of them."""
_said: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

T = TypeVar("T")


class Curvature(Protocol):
    """Products with H = grad^2_yy g and C = grad^2_xy g at one point; see `LowerCurvature`."""

    @property
    def gradient(self) -> Vector:
        """``grad_y g``."""
        ...

    @property
    def gradients(self) -> int:
        """Number of gradients so far."""
        ...

    @property
    def hvps(self) -> int:
        """Number of products with H so far; 0 where they count as gradients."""
        ...

    @property
    def jvps(self) -> int:
        """Likewise with C and C^T."""
        ...

    @property
    def mixed(self) -> bool:
        """Whether the lower gradient depends on x, as far as known."""
        ...

    @property
    def exact(self) -> bool:
        """Whether products are those of autograd; otherwise the loss is evaluated again for them."""
        ...

    @property
    def error(self) -> float:
        """The relative error of products, as measured; NaN: they are exact to rounding, or there was none."""
        ...

    def hvp(self, vector: Sequence[Tensor]) -> Vector:
        """Return H v."""
        ...

    def cross_vjp(self, vector: Sequence[Tensor]) -> Vector:
        """Return C v."""
        ...

    def cross_jvp(self, direction: Sequence[Tensor]) -> Vector:
        """Return C^T d."""
        ...

    def forget_loss(self) -> None:
        """Drop what only products with C^T need."""
        ...

    def by_autograd(self) -> LowerCurvature | None:
        """Return the products by autograd, without what replaces them where they fail; None: they are differences."""
        ...


@final
class _AutogradFirst:
    """Products by autograd, and by differences after the first that autograd does not have."""

    def __init__(
        self, exact: LowerCurvature, loss: LowerLoss, upper: Sequence[Tensor], lower: Sequence[Tensor]
    ) -> None:
        self._exact: LowerCurvature | None = exact
        self._now: Curvature = exact
        self._before = 0
        self._loss, self._upper = loss, upper
        self._lower = lower

    @property
    def gradient(self) -> Vector:
        return self._now.gradient

    @property
    def gradients(self) -> int:
        return self._before + self._now.gradients

    @property
    def hvps(self) -> int:
        return self._now.hvps

    @property
    def jvps(self) -> int:
        return self._now.jvps

    @property
    def mixed(self) -> bool:
        return self._now.mixed

    @property
    def exact(self) -> bool:
        return self._exact is not None

    @property
    def error(self) -> float:
        return self._now.error

    def hvp(self, vector: Sequence[Tensor]) -> Vector:
        return self._either(lambda now: now.hvp(vector))

    def cross_vjp(self, vector: Sequence[Tensor]) -> Vector:
        return self._either(lambda now: now.cross_vjp(vector))

    def cross_jvp(self, direction: Sequence[Tensor]) -> Vector:
        return self._either(lambda now: now.cross_jvp(direction))

    def forget_loss(self) -> None:
        self._now.forget_loss()

    def by_autograd(self) -> LowerCurvature | None:
        return self._exact

    def _either(self, product: Callable[[Curvature], T]) -> T:
        if self._exact is None:
            return product(self._now)
        try:
            return product(self._now)
        except SolverError as error:
            self._before, self._exact = self._exact.gradients, None
            self._now = DifferenceCurvature(self._loss, self._upper, self._lower)
            remember_without(self._lower, error)
            return product(self._now)


class Sampled(NamedTuple):
    """A lower loss at one point.

    Attributes:
        loss: g(x, y), the mean over processes, detached.
        curvature: Products there.
        graph: g(x, y) of this process with its graph; None: products are differences.
    """

    loss: Tensor
    curvature: Curvature
    graph: Tensor | None


def curvature_of(
    products: str,
    loss: LowerLoss,
    upper: Sequence[Tensor],
    lower: Sequence[Tensor],
    *,
    moves: bool = False,
    evaluated: Callable[[], None] = lambda: None,
) -> Sampled:
    """Return g(x, y) and products at this point, from one evaluation of the loss.

    Args:
        products: One of `PRODUCTS`.
        loss: g. It is evaluated as it is; differences evaluate it again under the same random states.
        upper: The tensors of x.
        lower: The tensors of y.
        moves: As in `LowerCurvature`.
        evaluated: Called after that evaluation; what follows are replays.

    Raises:
        SolverError: The products asked for cannot be had.
        ClosureError: As `LowerCurvature`.
    """
    again = loss if products == "autograd" else loss.replayed()
    if products == "difference" or (products == "auto" and _has_none((*upper, *lower), lower)):
        differences = DifferenceCurvature(again, upper, lower, loss.gradients((*upper, *lower)))
        evaluated()
        return Sampled(agreed(differences.loss), differences, None)
    value = loss.attached()
    evaluated()
    try:
        exact = LowerCurvature(value, upper, lower, moves=moves)
    except SolverError as error:
        if products == "autograd":
            raise
        differences = DifferenceCurvature(again, upper, lower)
        remember_without(lower, error)
        return Sampled(agreed(differences.loss), differences, None)
    curvature = exact if products == "autograd" else _AutogradFirst(exact, again, upper, lower)
    return Sampled(agreed(value), curvature, value)


def resumed(
    products: str, exact: LowerCurvature, loss: LowerLoss, upper: Sequence[Tensor], lower: Sequence[Tensor]
) -> Curvature:
    """Return products with a graph that is there already, for another caller, whose count begins at 0.

    Args:
        products: As the caller takes them, "autograd" or "auto".
        exact: Products with that graph.
        loss: g, under random states that are known.
        upper: The tensors of x.
        lower: The tensors of y.
    """
    exact.gradients = exact.hvps = exact.jvps = 0
    return exact if products == "autograd" else _AutogradFirst(exact, loss, upper, lower)


def refuse_products(owner: str, products: str, tensors: Sequence[Tensor]) -> None:
    """Raise where products by autograd are asked for, and parameters are in parts.

    Raises:
        OptionError: As described.
    """
    if products == "autograd" and any_in_parts(tensors):
        raise OptionError(
            f"{owner}(products='autograd'): parameters in parts (fully_shard) have first derivatives only, since their "
            "gradients are put together outside of autograd; give products='difference', or leave it out"
        )


def _has_none(tensors: Sequence[Tensor], lower: Sequence[Tensor]) -> bool:
    return any_in_parts(tensors) or known_without(lower)


def known_without(lower: Sequence[Tensor]) -> bool:
    """Return whether the loss of these tensors is known to have no second derivatives."""
    return bool(lower) and lower[0] in _without


def remember_without(lower: Sequence[Tensor], error: SolverError) -> None:
    """Take differences for these tensors from now on, and say so once."""
    if not known_without(lower):
        _without[lower[0]] = True
        cause = str(error).partition(" Ways out:")[0]
        warn(
            f"{cause} Products with second derivatives are taken by differences of gradients from now on, of two "
            "gradients each; products='difference' does so without this message, products='autograd' raises instead."
        )


def say_unresolved(lower: Sequence[Tensor], error: float) -> None:
    """Warn, once for these tensors, where a measured error of products by differences is too large."""
    if error > _UNRESOLVED and lower[0] not in _said:
        _said[lower[0]] = True
        warn(
            f"products by differences are wrong by {error:.0%} here, as two differences of the lower gradient show: "
            f"its change is close to rounding (of {rounding(lower):.0e}), or it has kinks. Take float64, or a lower "
            "loss with second derivatives (products='autograd')."
        )
