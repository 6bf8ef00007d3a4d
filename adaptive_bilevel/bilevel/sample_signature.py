"""What closures have in common with those of earlier steps: their code, and the sizes of the tensors that they hold."""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..evaluation.objective import Objective

__all__ = ["signature"]

_DEPTH, _MOST = 4, 16
"""So deep, and so many at each depth, parts of a closure are looked at."""


def signature(closures: Any, tensors: Sequence[Tensor] = ()) -> int:
    """Return a number that is the same for closures of the same code whose tensors have the same shapes.

    Args:
        closures: The closures, in any container.
        tensors: Of the variable that they are functions of.

    Looked at is what a closure holds: free variables, defaults, arguments of a partial. So another loss, and a batch of
    another size, have another number; another batch of the same size has not. What a closure takes from global
    variables is not seen.

    >>> import torch
    >>> def loss(batch):
    ...     return lambda: batch.sum()
    >>> sizes = [signature(loss(torch.ones(size))) for size in (2, 2, 3)]
    >>> sizes[0] == sizes[1], sizes[0] == sizes[2]
    (True, False)
    """
    shapes = [tuple(t.shape) for t in tensors]
    return zlib.crc32(repr((_described(closures, _DEPTH), shapes)).encode())


def _described(part: Any, depth: int) -> Any:
    if isinstance(part, Tensor):
        return tuple(part.shape)
    if isinstance(part, (list, tuple)) and depth:
        return [_described(each, depth - 1) for each in part[:_MOST]]
    if isinstance(part, Mapping) and depth:
        return [(str(name), _described(each, depth - 1)) for name, each in list(part.items())[:_MOST]]
    if isinstance(part, Objective):
        return _described(part.source, depth - 1) if depth else type(part).__qualname__
    if isinstance(part, functools.partial) and depth:
        return [_described(each, depth - 1) for each in (part.func, part.args, part.keywords)]
    if isinstance(part, types.MethodType):
        return _described(part.__func__, depth)
    if isinstance(part, types.FunctionType):
        return _of_function(part, depth)
    return type(part).__qualname__


def _of_function(function: types.FunctionType, depth: int) -> Any:
    code = function.__code__
    told = (function.__module__, function.__qualname__, code.co_code, code.co_names, code.co_freevars)
    if not depth:
        return told
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(_described(cell.cell_contents, depth - 1))
        except ValueError:  # a variable that has no value (yet)
            cells.append(None)
    return told, cells, _described(function.__defaults__ or (), depth - 1)
