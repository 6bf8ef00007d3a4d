"""One sum over processes, with torch's failures as errors of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed

from ..errors import ProcessError
from . import causes

__all__ = ["exchanged", "failed"]


def exchanged(block: Tensor, group: Any, op: Any = None) -> Tensor:
    """Reduce a block over the processes of a group, in place, and return it.

    Args:
        block: The numbers.
        group: A process group; None: all processes.
        op: A `torch.distributed.ReduceOp`; None: the sum.

    Raises:
        ProcessError: torch could not: a process has failed or ended, is elsewhere in its program, or the time is over.
    """
    try:
        distributed.all_reduce(block, op=distributed.ReduceOp.SUM if op is None else op, group=group)
    except RuntimeError as error:
        raise failed(error, group, f"{block.numel()} numbers") from error
    return block


def failed(error: Exception, group: Any, what: str = "what modules do") -> ProcessError:
    """Return the error that says what another process has raised, for torch's error of an exchange."""
    if cause := causes.left(group):
        return ProcessError(f"this process stopped, since the processes step together and {cause}")
    return ProcessError(
        f"the {distributed.get_world_size(group)} processes could not exchange {what}, and none has left a cause: one "
        f"has ended, has skipped a step, or has other parameters. torch says: {error}"
    )
