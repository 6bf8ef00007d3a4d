"""Whether processes that step together have the same parameters and options; each is looked at once."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ProcessError
from . import processes
from .causes import heard
from .parts import require_mesh
from .vectors import fingerprint
from .workspace import Workspace

__all__ = ["require_replicas"]

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_REMEDY = (
    "Processes that step together need the same parameters: make them alike (DistributedDataParallel, or "
    "torch.distributed.broadcast from one process), or set process_group to the processes that share them "
    f"({processes.ALONE!r}: this one)"
)
_EVERY = "One has skipped a step, or has left its loop: each process takes every step; a hypergradient counts, too"


def require_replicas(tensors: Sequence[Tensor], workspace: Workspace) -> None:
    """Raise on all processes where they differ in what they step: two numbers are compared.

    Values of tensors and options are compared when they are met first; the number of the tensors, and their shapes and
    dtypes, at each step. On an accelerator, at the first step only, since later ones do not wait for the device.

    Args:
        tensors: The parameters.
        workspace: Of the optimizer.

    Raises:
        ProcessError: Tensors or options differ, another step was begun on another process, or tensors are in parts over
            other processes.
    """
    require_mesh(tensors, processes.count())
    if processes.count() == 1:
        return
    new = [t for t in tensors if t not in _known]
    options = {} if workspace.compared else workspace.options()
    if not (new or options or processes.home().type == "cpu"):
        return
    forms = [(tuple(t.shape), str(t.dtype), t.requires_grad) for t in tensors]
    square = fingerprint(new)
    form = int.from_bytes(hashlib.sha256(repr((forms, len(new), options)).encode()).digest()[:7], "big")
    (value,) = struct.unpack("<q", struct.pack("<d", square))
    numbers = torch.tensor([form, ~form, value, ~value], dtype=torch.int64, device=processes.home())
    most, least, large, small = processes.summed(numbers, distributed.ReduceOp.MAX).tolist()
    if most != ~least or large != ~small:
        told = _Told(distributed.get_rank(), forms, len(new), options, square)
        raise ProcessError(_difference(heard(told, workspace.group)))
    for t in new:
        _known[t] = True
    workspace.compared = True


class _Told(NamedTuple):
    """What a process steps."""

    rank: int
    forms: Sequence[tuple[tuple[int, ...], str, bool]]
    new: int
    options: Mapping[str, Any]
    square: float


def _difference(heard: Sequence[_Told]) -> str:
    first, *others = heard
    for other in others:
        if (apart := _apart(first, other)) is not None:
            remedy = _REMEDY if first.new and other.new else _EVERY
            return f"{apart}. {remedy}"
        for name, value in first.options.items():
            if (theirs := other.options.get(name)) != value:
                return (
                    f"option {name} is {value!r} on process {first.rank} and {theirs!r} on process {other.rank}: "
                    "processes that step together take the same steps, so give them the same options"
                )
    return f"the processes are at different steps. {_EVERY}"


def _apart(one: _Told, other: _Told) -> str | None:
    """Return how the parameters of two processes differ."""
    if len(one.forms) != len(other.forms):
        return f"process {one.rank} steps {len(one.forms)} tensors, process {other.rank} steps {len(other.forms)}"
    for i, (a, b) in enumerate(zip(one.forms, other.forms, strict=True)):
        if a != b:
            return f"tensor {i} is {_named(a)} on process {one.rank} and {_named(b)} on process {other.rank}"
    if one.square != other.square:
        return (
            f"the parameters of processes {one.rank} and {other.rank} have different values (sums of squares "
            f"{one.square!r} and {other.square!r})"
        )
    return None


def _named(form: tuple[tuple[int, ...], str, bool]) -> str:
    shape, dtype, trained = form
    return f"{dtype} of shape {shape}{'' if trained else ', frozen'}"
