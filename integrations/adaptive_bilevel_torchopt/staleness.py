"""What must not change between ``solve()`` and the upper step: TorchOpt's backward reads it as it is then."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError
from adaptive_bilevel.evaluation.vectors import inner

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
        self._present: list[weakref.ref[Any]] = []
        self._replaced: list[weakref.ref[Any]] = []

    @property
    def known(self) -> bool:
        """Whether a solution was marked."""
        return self._marks is not None

    @property
    def replaced(self) -> list[Any]:
        """The graph's nodes of solutions that later loops have replaced, as far as anything still holds them."""
        return [alive for each in self._replaced if (alive := each()) is not None]

    def note(self, params: Iterable[Tensor]) -> None:
        """Remember the nodes of a solution, which the next loop replaces."""
        self._present += [weakref.ref(p.grad_fn) for p in params if p.grad_fn is not None]

    def begin(self, upper: Iterable[Tensor]) -> None:
        """Remember the upper tensors as they are when the loop begins."""
        self._replaced = [each for each in [*self._replaced, *self._present] if each() is not None]
        self._present = []
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
        return {"_marks": None, "upper": [], "_present": [], "_replaced": []}


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of some tensors, and for each of them a sum that tells where in it a value stands."""
    detached = [t.detach() for t in tensors]
    squares = inner(detached, detached)
    return torch.stack([squares, *(_placed(t.reshape(-1)).to(squares) for t in detached)])


_BLOCK = 4096


def _placed(flat: Tensor) -> Tensor:
    """Return sum_i w_i t_i with irregular factors w, for long vectors products of those of a block and within it."""
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    factors = _factors(flat.dtype, flat.device)
    if len(flat) <= _BLOCK:
        return torch.dot(flat, factors[: len(flat)])
    whole = len(flat) // _BLOCK * _BLOCK
    blocks = flat[:whole].view(-1, _BLOCK) @ factors
    # Turned round, or the j-th value of block i would have the factor of the i-th of block j.
    return _placed(torch.cat([blocks, flat[whole:]]).flip(0))


@functools.cache
def _factors(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return (torch.rand(_BLOCK, generator=generator, dtype=torch.float64, device="cpu") + 0.5).to(device, dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    """Return whether two fingerprints are equal, NaN being equal to itself."""
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
