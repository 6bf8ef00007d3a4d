"""Products with the second derivatives of the lower loss by differences of its gradients, where they cannot be had.

    H v   = (grad_y g(x, y + e v) - grad_y g(x, y - e v)) / (2 e) + O(e^2)
    C v   = (grad_x g(x, y + e v) - grad_x g(x, y - e v)) / (2 e) + O(e^2)
    C^T d = (grad_y g(x + e d, y) - grad_y g(x - e d, y)) / (2 e) + O(e^2)

The gradients are those of plain ``backward()``, on the same sample each time; no graph is kept. A product takes two.
They are taken without ``torch.autocast``: a difference would consist of its rounding.

Rounding asks for a long e, the third derivative for a short one. The gradient at the point itself, which is known,
tells both (see `adaptive_bilevel.hypergradient.difference_lengths`). Where another length is better by far, it is
tried, for two gradients more; the next product of the same kind begins with the length found, also that of the next
object on the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ..errors import ClosureError, SolverError
from ..evaluation.guard import Guard, RandomState
from ..evaluation.interception import in_full_precision
from ..evaluation.parts import part
from ..evaluation.tensors import gradients_of
from ..evaluation.vectors import Vector, add, inners, products, rounding, scale, stacked, zeros_like
from .difference_lengths import Measured, Trials, known_lengths
from .trees import Closure, evaluate

__all__ = ["DifferenceCurvature", "LowerLoss"]

_MOST_TRIES = 5


class LowerLoss(NamedTuple):
    """A lower loss on one sample: the sum of closures under a guard.

    Attributes:
        guard: Evaluates them.
        closures: Each with the random state that it is evaluated under; None: as it is, then and later.
        name: What errors call the loss.
    """

    guard: Guard
    closures: Sequence[tuple[Closure, RandomState | None]]
    name: str = "lower_closure"

    def attached(self) -> Tensor:
        """Return the loss with its graph, that of this process."""
        losses = [evaluate(self.guard, closure, self.name, random) for closure, random in self.closures]
        with torch.enable_grad():
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def gradients(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Vector, list[bool]]:
        """Return the loss, its gradients (means over processes), and by which inputs there is one."""
        total, known, loss = zeros_like(inputs), [False] * len(inputs), torch.zeros(())
        for i, (closure, random) in enumerate(self.closures):
            with in_full_precision():
                value, found = self.guard.gradient(closure, inputs, random)
            filled = tuple(gradients_of(inputs, inputs, found))
            total, loss = (filled, value) if i == 0 else (add(total, filled), loss + value)
            known = [a or g is not None for a, g in zip(known, found, strict=True)]
        return loss, total, known

    def replayed(self) -> LowerLoss:
        """Return the loss on the sample that the next evaluation will see."""
        now = self.guard.random_state()
        return self._replace(closures=[(closure, random or now) for closure, random in self.closures])


@final
class DifferenceCurvature:
    """What `LowerCurvature` is, by differences. Tensors are moved and put back bitwise.

    Args:
        loss: g on its sample, under random states that are known.
        upper: The tensors of x.
        lower: The tensors of y.
        found: What its ``gradients`` returned for all tensors at the point, where that is known.

    Attributes:
        loss: g(x, y), detached.
        gradient: ``grad_y g``.
        gradients: Number of gradients so far: 1, and 2 for each difference.
        exact: False.
        hvps: 0: products count as gradients.
        jvps: Likewise.
        mixed: As in `LowerCurvature`.
        error: The largest relative error of products so far, as their even parts show it, and as one over half of the
            length differs from one over the whole (for the first product of a kind, and now and then after that); NaN
            before the first.

    Raises:
        SolverError: A tensor is no leaf, or has less digits than float32.
        ClosureError: The loss depends on no tensor of ``lower``.
    """

    exact = False
    hvps = 0
    jvps = 0

    def __init__(
        self,
        loss: LowerLoss,
        upper: Sequence[Tensor],
        lower: Sequence[Tensor],
        found: tuple[Tensor, Vector, list[bool]] | None = None,
    ) -> None:
        self._loss, self._upper, self._lower = loss, tuple(upper), tuple(lower)
        self._moving = [p for p in (*upper, *lower) if p.requires_grad]
        for p in self._moving:
            _refuse(p)
        self.loss, self._here, known = loss.gradients((*upper, *lower)) if found is None else found
        if not any(known[len(self._upper) :]):
            raise ClosureError(
                f"{loss.name} returned a loss that depends on no tensor of lower: compute it from the very tensors "
                "that are passed, not from copies of them."
            )
        self.gradient: Vector = self._here[len(self._upper) :]
        self.gradients = 1
        self.mixed = any(known[: len(self._upper)])
        self.error = math.nan
        self._eps = rounding(self._moving)
        self._target = self._eps ** (1.0 / 3.0)

    def hvp(self, vector: Sequence[Tensor]) -> Vector:
        """Return H v: two gradients."""
        return self._product("hvp", (*zeros_like(self._upper), *vector), self._lower, self.gradient)

    def cross_vjp(self, vector: Sequence[Tensor]) -> Vector:
        """Return C v: two gradients."""
        here = self._here[: len(self._upper)]
        return self._product("cross_vjp", (*zeros_like(self._upper), *vector), self._upper, here)

    def cross_jvp(self, direction: Sequence[Tensor]) -> Vector:
        """Return C^T d: two gradients."""
        return self._product("cross_jvp", (*direction, *zeros_like(self._lower)), self._lower, self.gradient)

    def pull_back(self, vector: Sequence[Tensor]) -> tuple[Vector, Vector]:
        """Return (C v, H v): two gradients."""
        move = (*zeros_like(self._upper), *vector)
        both = self._product("pull_back", move, (*self._upper, *self._lower), self._here)
        return both[: len(self._upper)], both[len(self._upper) :]

    def push_forward(self, direction: Sequence[Tensor], vector: Sequence[Tensor]) -> Vector:
        """Return C^T d + H v: two gradients."""
        return self._product("push_forward", (*direction, *vector), self._lower, self.gradient)

    def forget_loss(self) -> None:
        """Do nothing: no graph is kept."""

    def by_autograd(self) -> None:
        """Return None."""
        return

    def _product(self, kind: str, move: Sequence[Tensor], inputs: Sequence[Tensor], here: Sequence[Tensor]) -> Vector:
        """Return the derivative of the gradient by ``inputs`` along a move of all tensors."""
        moves = [(p, m.detach()) for p, m in zip((*self._upper, *self._lower), move, strict=True) if p.requires_grad]
        both = [*(m for _, m in moves), *(p.detach() for p, _ in moves)]
        squares = stacked(products(both, both, None)).view(2, -1) if moves else torch.zeros(2, 1)
        size = math.sqrt(float(squares[0].sum()))
        if size == 0.0:
            return zeros_like(inputs)
        if not math.isfinite(size):
            return tuple(torch.full_like(t, math.nan, requires_grad=False) for t in inputs)
        moved, origin = squares.tolist()
        moves = [move for move, square in zip(moves, moved, strict=True) if square > 0.0]
        place = sum(square for square, length in zip(origin, moved, strict=True) if length > 0.0)
        known = known_lengths(next((p for p in self._lower if p.requires_grad), self._lower[0]))
        trials = Trials(known.get(kind), self._target, math.sqrt(place))
        product: Vector = ()
        for _ in range(_MOST_TRIES):
            found, measured = self._difference(moves, inputs, here, trials.length, size)
            product = found if trials.add(measured) else product
            if trials.ended:
                break
        error = trials.error
        if trials.due is None:
            known[kind] = trials.known()
        else:
            half, measured = self._difference(moves, inputs, here, trials.due, size)
            apart = add(product, half, -1.0)
            change, whole = torch.stack(inners((apart, apart), (product, product))).tolist()
            known[kind] = trials.known(measured, math.sqrt(change / whole) if whole > 0.0 else 0.0)
            error = max(error, known[kind].error)
        self.error = error if math.isnan(self.error) else max(self.error, error)
        return product

    def _difference(
        self,
        moves: Sequence[tuple[Tensor, Tensor]],
        inputs: Sequence[Tensor],
        here: Sequence[Tensor],
        length: float,
        size: float,
    ) -> tuple[Vector, Measured]:
        """Return the central difference over a length of moves of a size, and its parts."""
        factor = length / size
        origin = [part(p).detach().clone() for p, _ in moves]

        def at(sign: float) -> Vector:
            for (p, m), start in zip(moves, origin, strict=True):
                # No new version of the tensor: the user's graphs may hold it.
                part(p).data.copy_(start + sign * factor * part(m))
            self.gradients += 1
            return self._loss.gradients(inputs)[1]

        now = self._loss.guard.random_state()
        try:
            ahead, back = at(1.0), at(-1.0)
        finally:
            for (p, _), start in zip(moves, origin, strict=True):
                part(p).data.copy_(start)
            now.restore()
        odd = add(ahead, back, -1.0)
        even = add(add(ahead, back), here, -2.0)
        squares = torch.stack(inners((odd, odd), (even, even), (here, here)))
        change, bend, gradient = squares.sqrt().tolist()
        return scale(odd, 0.5 / factor), Measured(length, change, bend, self._eps * max(gradient, change))


def _refuse(tensor: Tensor) -> None:
    if not tensor.is_leaf:
        raise SolverError(
            "products by differences move tensors in place, and one of shape "
            f"{tuple(tensor.shape)} is no leaf: pass leaves, or products='autograd'"
        )
    if torch.finfo(tensor.dtype).eps > torch.finfo(torch.float32).eps:
        raise SolverError(
            f"products by differences: a tensor of shape {tuple(tensor.shape)} is {tensor.dtype}, which has too few "
            "digits for a difference. Keep parameters in float32 (with torch.autocast in the closure), or use a loss "
            "with second derivatives"
        )
