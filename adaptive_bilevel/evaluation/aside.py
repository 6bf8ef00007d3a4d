"""Gradients that are put aside while a closure runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["Aside"]


class Aside:
    """Takes gradients away for a while."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._held = tensors, [p.grad for p in tensors]

    def __enter__(self) -> None:
        for p, grad in zip(self._tensors, self._held, strict=True):
            if grad is not None:
                p.grad = None

    def __exit__(self, *error: object) -> None:
        for p, grad in zip(self._tensors, self._held, strict=True):
            p.grad = grad
