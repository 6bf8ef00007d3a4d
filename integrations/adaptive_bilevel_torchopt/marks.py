"""What must not change between ``solve()`` and the upper step: TorchOpt's backward reads it as it is then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError
from adaptive_bilevel.optim.scalars import inner

__all__ = ["Marks"]

_CHANGED = (
    "{who} changed between solve() and the upper step: TorchOpt would return a wrong hypergradient without saying so. "
    "Take the upper step (which takes the hypergradient first) right after solve(), and change things after it"
)


class Marks:
    """Tells whether upper or lower tensors were changed since the lower loop, in whichever way.

    Versions of tensors would not: changes through ``.data`` do not count.
    """

    def __init__(self) -> None:
        self.upper: list[Tensor] = []
        self._marks: tuple[Tensor, Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether a solution was marked."""
        return self._marks is not None

    def begin(self, upper: Iterable[Tensor]) -> None:
        """Remember the upper tensors as they are when the loop begins."""
        self.upper = [x for x in upper if x.is_floating_point()]
        self._marks = None
        self._at_begin = _fingerprint(self.upper)

    def mark(self, solution: Sequence[Tensor]) -> None:
        """Take the present lower tensors as the solution."""
        self._marks = self._at_begin, _fingerprint(solution)

    def check(self, who: str, solution: Sequence[Tensor], remedy: str = "") -> None:
        """Refuse a solution that TorchOpt's backward would not be taken at.

        Args:
            who: Who asks, for errors.
            solution: The lower tensors now.
            remedy: What else to do where the lower tensors have changed.

        Raises:
            HypergradientError: Upper or lower tensors were changed since they were marked.
        """
        if self._marks is None:
            return
        if not _same(self._marks[0], _fingerprint(self.upper)):
            raise HypergradientError(f"{who}: " + _CHANGED.format(who="the upper parameters"))
        if not _same(self._marks[1], _fingerprint(solution)):
            raise HypergradientError(f"{who}: " + _CHANGED.format(who="the lower parameters") + remedy)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying keeps: nothing, since there is no graph either."""
        return {"_marks": None, "upper": []}


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares and the sum of some tensors."""
    detached = [t.detach() for t in tensors]
    squares = inner(detached, detached)
    total = torch.zeros_like(squares)
    for t in detached:
        total += t.sum().to(total)
    return torch.stack([squares, total])


def _same(left: Tensor, right: Tensor) -> bool:
    """Return whether two fingerprints are equal, NaN being equal to itself."""
    return bool(((left == right) | ((left != left) & (right != right))).all())
