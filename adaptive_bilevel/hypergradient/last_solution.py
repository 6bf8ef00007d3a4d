"""Where `implicit` keeps the last solution for ``CG(warm_start=True)``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..evaluation.vectors import Vector

__all__ = ["forget", "recall", "remember"]

# Options are frozen and `implicit` is a function, so neither can hold a state. The solution belongs to the lower
# tensors: it has their shapes, and is useless without them. So they are the key, weakly: it dies with them. It is only
# ever a starting point, hence a stale one costs iterations and not correctness.
_solutions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def recall(lower: Sequence[Tensor]) -> Vector | None:
    """Return the last solution for these tensors, None if there is none that fits."""
    solution: Vector | None = _solutions.get(lower[0])
    if solution is None or len(solution) != len(lower):
        return None
    fits = all(
        v.shape == y.shape and v.dtype == y.dtype and v.device == y.device for v, y in zip(solution, lower, strict=True)
    )
    return solution if fits else None


def remember(lower: Sequence[Tensor], solution: Vector) -> None:
    """Keep ``solution`` as the start of the next solve for these tensors."""
    _solutions[lower[0]] = solution


def forget(lower: Sequence[Tensor]) -> None:
    """Drop what is kept for these tensors."""
    _solutions.pop(lower[0], None)
