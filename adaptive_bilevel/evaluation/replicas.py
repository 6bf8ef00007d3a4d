"""Whether processes that step together have the same parameters; each tensor is looked at once."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ProcessError
from . import processes
from .parts import require_mesh
from .vectors import fingerprint

__all__ = ["require_replicas"]

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_REMEDY = (
    "Processes that step together need the same parameters: make them alike (DistributedDataParallel, or "
    "torch.distributed.broadcast from one process), or set process_group to the processes that share them "
    f"({processes.ALONE!r}: this one)"
)


def require_replicas(tensors: Sequence[Tensor]) -> None:
    """Raise on all processes where tensors differ between them, when they are met first: two numbers are compared.

    Raises:
        ProcessError: Number, shapes, dtypes or values differ; or tensors are in parts over other processes.
    """
    require_mesh(tensors, processes.count())
    if processes.count() == 1:
        return
    new = [t for t in tensors if t not in _known]
    if not new:
        return
    forms = [(tuple(t.shape), str(t.dtype), t.requires_grad) for t in new]
    square = fingerprint(new)
    form = int.from_bytes(hashlib.sha256(repr(forms).encode()).digest()[:7], "big")
    (value,) = struct.unpack("<q", struct.pack("<d", square))
    numbers = torch.tensor([form, ~form, value, ~value], dtype=torch.int64, device=processes.home())
    most, least, large, small = processes.summed(numbers, distributed.ReduceOp.MAX).tolist()
    if most != ~least or large != ~small:
        heard = processes.heard((distributed.get_rank(), forms, square))
        raise ProcessError(f"{_difference(heard)}. {_REMEDY}")
    for t in new:
        _known[t] = True


def _difference(heard: Sequence[tuple[int, list[Any], float]]) -> str:
    rank, forms, square = heard[0]
    for other, theirs, value in heard[1:]:
        if len(theirs) != len(forms):
            return f"process {rank} steps {len(forms)} tensors, process {other} steps {len(theirs)}"
        for i, (a, b) in enumerate(zip(forms, theirs, strict=True)):
            if a != b:
                return f"tensor {i} is {_named(a)} on process {rank} and {_named(b)} on process {other}"
        if value != square:
            return (
                f"the parameters of processes {rank} and {other} have different values (sums of squares {square!r} and "
                f"{value!r})"
            )
    return "the parameters of the processes differ"


def _named(form: tuple[tuple[int, ...], str, bool]) -> str:
    shape, dtype, trained = form
    return f"{dtype} of shape {shape}{'' if trained else ', frozen'}"
