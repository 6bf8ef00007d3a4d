"""The trials of one search, some of which may not be computable: an argument or a scale that has left its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ..errors import AdaptiveBilevelError, ProcessError
from .causes import ARITHMETIC

__all__ = ["Attempts"]

T = TypeVar("T")


class Attempts:
    """The trials of one search. One that raises an arithmetic error is rejected; one search of nothing else raises it.

    At the point itself, which is the user's, such an error is the user's, too: it is not evaluated through this class.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._succeeded = False

    def value(self, evaluate: Callable[[], Tensor | float]) -> Tensor | float:
        """Return the value of a trial; infinity if it cannot be computed."""
        nothing: Tensor | float = math.inf
        return self._attempt(evaluate, nothing)

    def holds(self, test: Callable[[], bool]) -> bool:
        """Return whether a test of a trial holds; it does not if it cannot be computed."""
        return self._attempt(test, False)

    def _attempt(self, evaluate: Callable[[], T], otherwise: T) -> T:
        try:
            found = evaluate()
        except ARITHMETIC as error:
            if isinstance(error, AdaptiveBilevelError) and not isinstance(error, ProcessError):
                raise
            self._error = error
            return otherwise
        self._succeeded = True
        return found

    def conclude(self, moved: Tensor | bool) -> None:
        """Raise the error if there was no trial without one, and no step: then it is not the length that is wrong."""
        if self._error is not None and not self._succeeded and not bool(moved):
            raise self._error
