"""What is known of the lower tensors beyond a step, as plain numbers and tensors to be saved with the upper state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .difference_lengths import restore_lengths, saved_lengths

__all__ = ["NAMES", "restore_below", "saved_below"]

_KNOWN: Mapping[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "difference_lengths": (saved_lengths, restore_lengths),
}
"""How each is saved and restored."""

NAMES = tuple(_KNOWN)


def saved_below(lower: Sequence[Tensor]) -> dict[str, Any]:
    """Return what is known of lower tensors, by `NAMES`, without what is empty."""
    found = {name: save(lower) for name, (save, _) in _KNOWN.items()}
    return {name: known for name, known in found.items() if known}


def restore_below(lower: Sequence[Tensor], saved: Mapping[str, Any]) -> None:
    """Put what `saved_below` returned in the place of what is known."""
    for name, (_, restore) in _KNOWN.items():
        restore(lower, saved.get(name, {}))
