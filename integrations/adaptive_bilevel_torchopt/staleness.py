"""What must not change between ``solve()`` and the upper step: TorchOpt's backward reads it as it is then."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError

from ._host import Node

__all__ = ["StalenessCheck"]

_CHANGED = (
    "{who} changed between solve() and the upper step: TorchOpt would return a wrong hypergradient without saying so. "
    "Take the upper step (which takes the hypergradient first) right after solve(), and change things after it"
)


@final
class StalenessCheck:
    """Whether upper or lower tensors were changed since the lower loop, in whichever way.

    Versions of tensors would not show it: changes through ``.data`` do not count.

    Attributes:
        upper: The upper tensors that the loop was begun with.
    """

    def __init__(self) -> None:
        self.upper: list[Tensor] = []
        self._taken: tuple[Tensor, Tensor] | None = None
        self._present: list[weakref.ref[Node]] = []
        self._replaced: list[weakref.ref[Node]] = []

    @property
    def replaced(self) -> list[Node]:
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
        self._taken = None
        self._at_begin = _fingerprint(self.upper)

    def take(self, solution: Sequence[Tensor]) -> None:
        """Take the present lower tensors as the solution."""
        self._taken = self._at_begin, _fingerprint(solution)

    def check(self, who: str, solution: Sequence[Tensor], remedy: str = "") -> bool:
        """Reject a solution that TorchOpt's backward would not be taken at.

        Args:
            who: Name for errors.
            solution: The lower tensors now.
            remedy: What else to do where the lower tensors have changed.

        Returns:
            Whether there was a solution to compare with.

        Raises:
            HypergradientError: Upper or lower tensors were changed since they were taken.
        """
        if self._taken is None:
            return False
        if not _same(self._taken[0], _fingerprint(self.upper)):
            raise HypergradientError(f"{who}: " + _CHANGED.format(who="the upper parameters"))
        if not _same(self._taken[1], _fingerprint(solution)):
            raise HypergradientError(f"{who}: " + _CHANGED.format(who="the lower parameters") + remedy)
        return True

    def __getstate__(self) -> dict[str, object]:
        """Return what copying keeps: nothing, since there is no graph either."""
        return {"_taken": None, "upper": [], "_present": [], "_replaced": []}


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each tensor its sum of squares, and a sum that shows where in it a value stands."""
    flat = [_widened(t.detach().reshape(-1)) for t in tensors]
    parts = [part for t in flat for part in (torch.dot(t, t), _placed(t))]
    return torch.stack([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)


def _widened(flat: Tensor) -> Tensor:
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


_BLOCK = 4096


def _placed(flat: Tensor) -> Tensor:
    """Return sum_i w_i t_i with irregular factors w, for long vectors products of those of a block and within it."""
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
