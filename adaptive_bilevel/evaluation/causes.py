"""What has failed on one process, told to the others: by an exchange where they wait for one, in a store otherwise.

An error inside of a wrapped module or of a backward finds the other processes in exchanges of torch's, until these fail
at the time limit. The process cannot take part in them, and an exchange of another kind meanwhile would end all
processes. So it leaves the error in the store of the process group, under the number of the evaluation, which is the
same on all processes. A process whose exchange has failed reads it there.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import distributed

from ..errors import AdaptiveBilevelError, ProcessError

__all__ = ["ARITHMETIC", "begin", "heard", "is_of_an_exchange", "leave", "left", "tell"]

ARITHMETIC = (ArithmeticError, ValueError, torch.linalg.LinAlgError)
"""How Python, NumPy and torch (linear algebra, distributions) say that something cannot be computed there."""

_GLOO = ("gloo/", "Application timeout caused pair closure", "Connection closed by peer")
"""What is in its errors, which have no class of their own."""

_PATIENCE = 1.0
"""Seconds; what another process leaves takes a moment."""

_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many evaluations each process group has begun."""


class _ArithmeticElsewhere(ProcessError, ArithmeticError):
    """Another process could not compute something there."""


def begin(group: Any) -> None:
    """Count an evaluation of a group (None: of all processes)."""
    _numbers[_known(group)] = _numbers.get(_known(group), 0) + 1


def is_of_an_exchange(error: Exception) -> bool:
    """Return whether it is torch's error of an exchange that failed."""
    if isinstance(error, AdaptiveBilevelError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(text in str(error) for text in _GLOO)


def leave(group: Any, error: Exception) -> None:
    """Leave an error for the others; the first one of an evaluation stays. What others have told is not left."""
    if isinstance(error, ProcessError):
        return
    try:
        _store(group).compare_set(_key(group), "", f"process {distributed.get_rank()} raised {_text(error)}")
    except (AttributeError, KeyError, RuntimeError):  # it has ended with the process that held it
        return


def left(group: Any) -> str:
    """Return which process has raised what in this evaluation; an empty text where none has left anything."""
    try:
        store, key, end = _store(group), _key(group), time.monotonic() + _PATIENCE
        while not store.check([key]):
            if time.monotonic() > end:
                return ""
            time.sleep(0.01)
        return str(store.get(key).decode())
    except (AttributeError, KeyError, RuntimeError):
        return ""


def tell(group: Any, error: Exception | None) -> NoReturn:
    """Raise this process's error, or one that names another process and its error; all processes call this."""
    own = error if not isinstance(error, ProcessError) else None
    said = None
    if own is not None:
        arithmetic = isinstance(own, ARITHMETIC) and not isinstance(own, AdaptiveBilevelError)
        said = (distributed.get_rank(), _text(own), arithmetic)
    everything = heard(said, group)
    begin(group)  # a later exchange that fails is not for what all have heard of
    if error is not None:
        raise error
    failed = [one for one in everything if one is not None]
    text = "; ".join(f"process {rank} raised {what}" for rank, what, _ in failed)
    kind = _ArithmeticElsewhere if failed and all(arithmetic for *_, arithmetic in failed) else ProcessError
    raise kind(f"this process stopped, since the processes step together and {text or 'another one failed'}")


def heard(said: object, group: Any) -> list[Any]:
    """Return what every process says; for errors only, since it takes several exchanges."""
    everything: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everything, said, group=group)
    return everything


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _store(group: Any) -> Any:
    return distributed.distributed_c10d._get_process_group_store(_known(group))


def _key(group: Any) -> str:
    return f"adaptive_bilevel/{_numbers.get(_known(group), 0)}"


def _known(group: Any) -> Any:
    return distributed.group.WORLD if group is None else group
