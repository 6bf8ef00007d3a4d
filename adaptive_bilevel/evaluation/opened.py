"""The guards that are open on this thread: which step an evaluation is a part of."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from .interception import Watching

if TYPE_CHECKING:
    from .guard import Guard

__all__ = ["closing", "opened", "spanned"]

F = TypeVar("F", bound=Callable[..., Any])


class _Open(threading.local):
    """The guards that are open on this thread, innermost last."""

    def __init__(self) -> None:
        self.guards: list[Guard] = []


opened = _Open()


def closing(function: F) -> F:
    """Decorate a function with guards inside: none stays open when it raises.

    An interrupt (Ctrl-C) may come at any line, also where a guard is entered or left; what it was about to put back is
    put back here.
    """

    @functools.wraps(function)
    def closed(*args: Any, **kwargs: Any) -> Any:
        depth, outer = len(opened.guards), Watching.now()
        try:
            return function(*args, **kwargs)
        except BaseException:
            while len(opened.guards) > depth:
                opened.guards[-1].abandon()
                outer.restore()
            raise

    return closed  # type: ignore[return-value]


def spanned(tensors: Iterable[Tensor]) -> bool:
    """Return whether a closure is being evaluated on this thread, of a step that may move one of the tensors."""
    if Watching.now().recorder is None:
        return False
    known = {id(p) for p in tensors}
    return any(guard.spans(known) for guard in opened.guards)
