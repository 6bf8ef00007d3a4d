"""Several processes, each with a copy of all parameters and data of its own: means over them, and errors of all.

The loss of a level is the mean of the processes' losses. So its value, its gradients and its products with second
derivatives are the means of theirs, and what is computed from means is the same on every process. `mean` takes vectors,
by one all-reduce of their size; `reductions.agree` takes scalars.

A closure may raise on one process. Others wait for that process at the mean that follows the evaluation, so it takes
part in it, with a flag: all processes raise then. `means_of` and `value_of` do so. See `ready` for wrapped modules, and
`amid` for errors inside of these.

Which processes: those of the process group of the guard that is open, see `Workspace.group`; all of them by default.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from ..errors import OptionError, ProcessError
from . import causes
from .exchange import exchanged, failed
from .parts import in_parts
from .vectors import Vector, widen

__all__ = [
    "ALONE",
    "Group",
    "amid",
    "checked",
    "count",
    "first",
    "home",
    "mean",
    "means_of",
    "of_group",
    "packed",
    "ready",
    "summed",
    "together",
    "value_of",
]

T = TypeVar("T")

Group = Any
"""A `torch.distributed.ProcessGroup`; None: all processes; `ALONE`."""

ALONE = "alone"
"""In the place of a process group: this process has parameters of its own."""


class _Here(threading.local):
    """What is so on this thread.

    Attributes:
        group: The processes.
        numbers: How many numbers `ready` is to exchange.
        stopped: What it has raised.
        evaluated: The group of the evaluation that runs; ALONE: none does.
        apart: Whether no process waits for this one at the end of that.
    """

    group: Group = None
    numbers: int = 0
    stopped: Exception | None = None
    evaluated: Group = ALONE
    apart: bool = False


_here = _Here()


def checked(owner: str, group: Group) -> Group:
    """Return a process group, or raise where it is none, or has gone.

    Raises:
        OptionError: As described.
    """
    if group is None or group == ALONE:
        return group
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise OptionError(
            f"{owner}: process_group={group!r} must be a torch.distributed process group, None (all processes) or "
            f"{ALONE!r} (this one)"
        )
    return group


def of_group(group: Group) -> Group:
    """Take a process group from now on, on this thread, and return the one before."""
    before, _here.group = _here.group, group
    return before


def count() -> int:
    """Return the number of processes that means are over."""
    group = _here.group
    if group == ALONE or not distributed.is_available():
        return 1
    if not distributed.is_initialized():
        if group is not None:
            raise ProcessError("process_group: the group is gone, since torch.distributed was ended or not begun")
        return 1
    try:
        distributed.get_rank(group)  # the size of a group that has gone is still known
    except ValueError as error:
        raise ProcessError(f"process_group: the group is gone, ended by destroy_process_group: {group!r}") from error
    return max(distributed.get_world_size(group), 1)


def home() -> torch.device:
    """Return the device of numbers that processes exchange."""
    if distributed.get_backend(_here.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def summed(block: Tensor, op: Any = None) -> Tensor:
    """Reduce a block over the processes, in place, and return it; see `exchanged`."""
    try:
        return exchanged(block, _here.group, op)
    except ProcessError:
        _here.apart = True
        raise


def mean(tensors: Sequence[Tensor]) -> Vector:
    """Return the means over the processes of tensors that have the same shapes on each: one all-reduce.

    Tensors in parts are returned as they are: they are one tensor, of which each process holds a part.
    """
    places = [i for i, t in enumerate(tensors) if not in_parts(t)]
    if count() == 1 or not places:
        return tuple(tensors)
    found = list(tensors)
    for i, t in zip(places, _reduced([tensors[i] for i in places], [])[0], strict=True):
        found[i] = t
    return tuple(found)


def first(number: int) -> int:
    """Return the number of the first process of the group."""
    if count() == 1:
        return number
    own = number if distributed.get_rank(_here.group) == 0 else 0
    return int(summed(torch.tensor([own], dtype=torch.int64, device=home())))


def _reduced(tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Vector, Tensor]:
    """Return means of tensors, and sums of numbers that travel with the first block of them.

    There is a block for each device and dtype, in at least float32; a sum over processes in less loses digits.
    """
    processes, wide = count(), widen(tensors)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(wide):
        places.setdefault((t.device, t.dtype), []).append(i)
    if not places:
        return (), summed(torch.tensor(numbers, dtype=torch.float64, device=home()))
    found: dict[int, Tensor] = {}
    sums: Tensor | None = None
    for (device, dtype), indices in places.items():
        parts = [wide[i].reshape(-1) for i in indices]
        if sums is None:
            parts.append(torch.tensor(numbers, dtype=dtype, device=device))
        block = summed(torch.cat(parts))
        cut = block.numel() - len(numbers) if sums is None else block.numel()
        sums = block[cut:].clone() if sums is None else sums
        block = block[:cut].div_(processes)
        found.update(zip(indices, block.split([wide[i].numel() for i in indices]), strict=True))
    assert sums is not None
    return tuple(found[i].view(t.shape).to(t.dtype) for i, t in enumerate(tensors)), sums


# ------------------------------------------------------------------------------------------ errors of one process


def together(evaluate: Callable[[], T]) -> T:
    """Return what is evaluated, or raise on all processes if it raises on one; one all-reduce of a number."""
    if count() == 1:
        return evaluate()
    result, error = _attempted(evaluate, 1)
    _conclude(float(_exchanged(error, lambda: summed(packed([float(error is not None)])))), error)
    return cast(T, result)


def value_of(evaluate: Callable[[], Tensor | float]) -> Tensor | float:
    """Return the mean of a value, or raise on all processes if it raises on one; one all-reduce of two numbers."""
    processes = count()
    if processes == 1:
        return evaluate()
    result, error = _attempted(evaluate, 2)
    numbers = [0.0 if result is None else result, float(error is not None)]
    sums = _exchanged(error, lambda: summed(packed(numbers)))
    value, failed = sums.tolist()
    _conclude(failed, error)
    return sums[0] / processes if isinstance(result, Tensor) else value / processes


def means_of(
    evaluate: Callable[[], T], parts: Callable[[T | None], tuple[Sequence[Tensor | None], Sequence[Tensor]]]
) -> tuple[T, list[Tensor | None]]:
    """Return what is evaluated, and the means of tensors in it, by one all-reduce of their size.

    A tensor that is None on every process stays None; on some, it counts as zeros there. On an accelerator, whether
    another process has failed is not looked at, since that would wait for the device: means are not finite then.

    Args:
        evaluate: Called once.
        parts: Returns the tensors of what it returned, and tensors of their shapes; None: it has raised.
    """
    result, error = _attempted(evaluate)
    given, like = parts(result)
    absent = 0.0 if error is None else torch.nan
    filled = [
        torch.full_like(t, absent, requires_grad=False) if g is None else g.detach()
        for t, g in zip(like, given, strict=True)
    ]
    flags = [float(error is not None), *(float(g is not None) for g in given)]
    means, sums = _exchanged(error, lambda: _reduced(filled, flags))
    if error is not None or sums.device.type == "cpu":
        _conclude(float(sums[0]), error)
    result = cast(T, result)
    if all(g is not None for g in given):
        return result, list(means)
    known = [n > 0.0 for n in sums[1:].tolist()]
    return result, [m if there else None for m, there in zip(means, known, strict=True)]


def packed(values: Sequence[Tensor | float]) -> Tensor:
    """Return numbers as one tensor that processes can exchange."""
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    device = home() if device is None or device.type == "cpu" else device
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in values])


def ready() -> None:
    """Raise where another process has failed already; whatever is about to exchange something by itself calls it.

    It exchanges as many numbers as the end of the evaluation, where a process that has failed is already.
    """
    if _here.stopped is None and _here.numbers > 0:
        try:
            _conclude(float(summed(packed([0.0] * _here.numbers))[-1]), None)
        except ProcessError as error:
            _here.stopped = error
    if _here.stopped is not None:
        raise _here.stopped


def amid() -> None:
    """Take note of an error between exchanges of torch's: no process waits for this one at the end."""
    _here.apart = True


def _attempted(evaluate: Callable[[], T], numbers: int = 0) -> tuple[T | None, Exception | None]:
    """Return what is evaluated, or its error; raise that where the others do not wait for this process, see `ready`."""
    before = _here.numbers, _here.evaluated
    if _here.evaluated is not _here.group:
        _here.apart = False
        causes.begin(_here.group)
    _here.numbers, _here.evaluated = numbers, _here.group
    result: T | None = None
    error: Exception | None = None
    try:
        result = evaluate()
    except Exception as raised:  # whatever it is: the other processes wait
        error = raised
    finally:
        _here.numbers, _here.evaluated = before
        stopped, _here.stopped = _here.stopped, None
    if stopped is not None:
        raise stopped
    if error is not None and causes.is_of_an_exchange(error):
        _here.apart = True
        raise failed(error, _here.group) from error
    if error is not None:
        causes.leave(_here.group, error)
        if _here.apart:
            raise error
    return result, error


def _exchanged(error: Exception | None, exchange: Callable[[], T]) -> T:
    """Return what is exchanged; where that fails after an error of this process, raise that, which is the cause."""
    try:
        return exchange()
    except ProcessError as failed:
        if error is None:
            raise
        raise error from failed


def _conclude(failed: float, error: Exception | None) -> None:
    if failed > 0.0 or error is not None:
        causes.tell(_here.group, error)
