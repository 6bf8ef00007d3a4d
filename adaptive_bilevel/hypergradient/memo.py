"""What an oracle computed last, so that asking for it twice costs once."""

from __future__ import annotations

from typing import Generic, TypeVar

from ..evaluation.vectors import Vector
from .sample import Sample

__all__ = ["Memo"]

T = TypeVar("T")


class Memo(Generic[T]):
    """The last value of one kind. It is that of the very objects x, y and sample; equal ones are asked for anew."""

    def __init__(self) -> None:
        self._known: tuple[Vector, Vector, Sample, T] | None = None

    def recall(self, x: Vector, y: Vector, sample: Sample) -> T | None:
        """Return the value at this point and sample; None: it is not known."""
        if self._known is None:
            return None
        known_x, known_y, known_sample, value = self._known
        return value if known_x is x and known_y is y and known_sample is sample else None

    def keep(self, x: Vector, y: Vector, sample: Sample, value: T) -> T:
        """Keep a value in the place of the last one, and return it."""
        self._known = (x, y, sample, value)
        return value

    def forget(self) -> None:
        """Drop the value."""
        self._known = None
