"""What one evaluation of a bilevel problem is made on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import torch

__all__ = ["Batch", "Sample"]

Batch: TypeAlias = Any  # whatever the losses take


class Sample(NamedTuple):
    """What one evaluation is made on.

    Attributes:
        upper: Batch of the upper loss.
        lower: Batch of the lower loss.
        seed: Seed of all random numbers drawn inside the losses and estimators.
        upper_id: Which summand of a finite sum the upper batch is; None if unknown. SAGA needs it.
        lower_id: Likewise.
        products: Further lower batches, for estimators that take each product on an independent one.
    """

    upper: Batch = None
    lower: Batch = None
    seed: int = 0
    upper_id: Hashable = None
    lower_id: Hashable = None
    products: tuple[Batch, ...] = ()

    def generator(self, device: torch.device | None = None) -> torch.Generator:
        """Return a generator in the state that the seed gives."""
        return torch.Generator("cpu" if device is None else device).manual_seed(self.seed)
