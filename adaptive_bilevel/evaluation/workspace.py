"""What a guard keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .processes import Group

__all__ = ["Workspace"]


class Workspace:
    """What a guard keeps between steps: memory for the copies, and what it learned about the closures.

    Args:
        lasting: Whether the memory is kept too.
        group: The processes that step together: a process group, None (all) or "alone".
        options: Returns options that have to be the same on all of them, as plain values.

    Attributes:
        compared: Whether that was looked at.
        wrapped: Whether modules that exchange something have run (`replicated`); None: there was no gradient yet.
    """

    def __init__(
        self, lasting: bool = True, group: Group = None, options: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self._lasting, self.group, self.options = lasting, group, options
        self.compared = False
        self.wrapped: bool | None = None
        self.copies: list[Tensor] = []
        self.trials_need_grad = False

    def fit(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return memory of the tensors' shapes; if it is kept, it is allocated only when they have changed."""
        if not self._lasting:
            return [torch.empty_like(p, requires_grad=False) for p in tensors]
        same = len(self.copies) == len(tensors) and all(
            c.shape == p.shape and c.dtype == p.dtype and c.device == p.device
            for c, p in zip(self.copies, tensors, strict=True)
        )
        if not same:
            self.copies = [torch.empty_like(p, requires_grad=False) for p in tensors]
        return self.copies
