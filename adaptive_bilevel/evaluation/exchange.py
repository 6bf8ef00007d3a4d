"""One sum over processes, with torch's failures as errors of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed

from ..errors import ProcessError

__all__ = ["exchanged"]


def exchanged(block: Tensor, group: Any, op: Any = None) -> Tensor:
    """Reduce a block over the processes of a group, in place, and return it.

    Args:
        block: The numbers.
        group: A process group; None: all processes.
        op: A `torch.distributed.ReduceOp`; None: the sum.

    Raises:
        ProcessError: torch could not: a process has ended, is elsewhere in its program, or the time is over.
    """
    try:
        distributed.all_reduce(block, op=distributed.ReduceOp.SUM if op is None else op, group=group)
    except RuntimeError as error:
        raise ProcessError(
            f"the {distributed.get_world_size(group)} processes could not exchange {block.numel()} numbers: one has "
            f"ended, has skipped a step, or has other parameters. torch says: {error}"
        ) from error
    return block
