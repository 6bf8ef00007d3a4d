"""Parameters in parts: a DTensor of `torch.distributed.fsdp.fully_shard`, of which each process holds one part.

Such a tensor stays a DTensor wherever the package keeps it: as a parameter, a gradient, a vector, an entry of a state.
Arithmetic on lists of tensors is done on the parts (`adaptive_bilevel.evaluation.foreach`), and sums over entries, of
which inner products and norms are made, are completed by `whole`. Other code does not know of parts.

Gradients by such parameters come from the backward of their module, which leaves means over the processes in ``.grad``
(`adaptive_bilevel.evaluation.replicated`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ProcessError, TensorError
from .exchange import exchanged

__all__ = [
    "Spread",
    "any_in_parts",
    "form",
    "formed",
    "gathered",
    "in_parts",
    "part",
    "refuse_parts",
    "require_mesh",
    "require_whole",
    "scattered",
    "spread",
    "whole",
]


def _module() -> Any:
    return sys.modules.get("torch.distributed.tensor")  # where it was not imported, there is no DTensor


def in_parts(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    module = _module()
    return module is not None and isinstance(tensor, module.DTensor)


def any_in_parts(tensors: Iterable[object]) -> bool:
    """Return whether one of the tensors is a DTensor."""
    module = _module()
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def part(tensor: Any) -> Any:
    """Return the part of a DTensor that this process holds, sharing its memory; anything else as it is."""
    if not in_parts(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def form(tensor: Any) -> Any:
    """Return how a DTensor is laid out, without its entries; None for a whole tensor."""
    return tensor._spec if in_parts(tensor) else None


def formed(local: Tensor, form: Any) -> Tensor:
    """Return the DTensor of a part, laid out in a form; with None, the part is the tensor itself."""
    if form is None:
        return local
    made: Tensor = _module().DTensor(local, form, requires_grad=False)  # from_local takes 20 times as long
    return made


def whole(sums: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return sums over all entries of tensors, from those over the entries that this process holds.

    It takes one all-reduce for the parts on each mesh and dtype; for whole tensors, none.

    Args:
        sums: One 0-dim tensor for each of the tensors.
        tensors: What the sums are over.
    """
    found = list(sums)
    places: dict[tuple[Spread, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if (over := spread(t)) is not None:
            places.setdefault((over, found[i].dtype), []).append(i)
    for (over, _), indices in places.items():
        block = over.total(torch.stack([found[i] for i in indices]))
        for i, total in zip(indices, block.unbind(), strict=True):
            found[i] = total
    return found


class Spread(NamedTuple):
    """The processes that hold different entries of a tensor.

    Attributes:
        mesh: Of the processes.
        dimensions: Those of the mesh along which entries differ.
    """

    mesh: Any
    dimensions: tuple[int, ...]

    def total(self, sums: Tensor) -> Tensor:
        """Return sums over all entries, from those over the entries that this process holds; changed in place."""
        for dimension in self.dimensions:
            exchanged(sums, self.mesh.get_group(dimension))
        return sums


def spread(tensor: Any) -> Spread | None:
    """Return over which processes the entries of a tensor are spread; None: this one holds them all."""
    if not in_parts(tensor):
        return None
    mesh = tensor.device_mesh
    split = [dim for dim, p in enumerate(tensor.placements) if not p.is_replicate() and mesh.size(dim) > 1]
    return Spread(mesh, tuple(split)) if split else None


def gathered(tensor: Any) -> Tensor:
    """Return all entries of a tensor, detached."""
    found: Tensor = tensor.detach().full_tensor() if in_parts(tensor) else tensor.detach()
    return found


def scattered(values: Tensor, like: Any) -> Tensor:
    """Return values that every process has, laid out as a tensor is; those that are in parts already as they are."""
    if not in_parts(like) or in_parts(values):
        return values
    made: Tensor = _module().distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
    return made


# ------------------------------------------------------------------------------------------ what is refused


def refuse_parts(owner: str, tensor: Any, what: str = "parameter") -> None:
    """Raise for a DTensor that is laid out as `fully_shard` lays out none.

    Raises:
        TensorError: As described.
    """
    if not in_parts(tensor):
        return
    name, remedy = f"{owner}: a {what} of shape {tuple(tensor.shape)}", "fully_shard on the devices of the parameters"
    kinds = [str(p) for p in tensor.placements]
    if sum(p.is_shard() for p in tensor.placements) > 1 or any(p.is_partial() for p in tensor.placements):
        raise TensorError(
            f"{name} is a DTensor with placements {kinds}: only parameters in parts along one dimension of the mesh "
            f"are supported, as {remedy} makes them; leave tensor parallelism out, or use DistributedDataParallel"
        )
    if tensor.device.type != tensor.device_mesh.device_type:
        raise TensorError(
            f"{name} is on {tensor.device.type} beside a mesh of {tensor.device_mesh.device_type}: steps do their "
            f"arithmetic where the parameters are, and exchange its results. Leave CPUOffloadPolicy out: {remedy}"
        )


def require_whole(owner: str, tensors: Iterable[object], why: str) -> None:
    """Raise where a tensor is in parts.

    Args:
        owner: Name for errors.
        tensors: The tensors; what is no tensor passes.
        why: Why they cannot be, and what can.

    Raises:
        TensorError: As described.
    """
    for t in tensors:
        if isinstance(t, Tensor) and in_parts(t):
            raise TensorError(f"{owner}: a tensor of shape {tuple(t.shape)} is a DTensor: {why}")


def require_mesh(tensors: Sequence[Any], count: int) -> None:
    """Raise where tensors are in parts over other processes than those that step together.

    Args:
        tensors: The tensors.
        count: The number of processes that step together.

    Raises:
        ProcessError: As described.
    """
    for t in tensors:
        if in_parts(t) and t.device_mesh.size() != count:
            raise ProcessError(
                f"process_group: {count} processes step together, and a parameter of shape {tuple(t.shape)} is in "
                f"parts over {t.device_mesh.size()}. Set process_group to the processes of its mesh"
            )
