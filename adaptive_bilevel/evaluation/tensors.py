"""Lists of tensors as the steps need them: which can be stepped on, slopes along them, gradients of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import TensorError
from .parts import refuse_parts
from .vectors import inner

__all__ = ["gradients_of", "refuse_unsupported", "slope_of", "tainted"]


def refuse_unsupported(owner: str, tensor: Tensor, what: str = "parameter") -> None:
    """Raise for tensors that no step size makes sense for."""
    refuse_parts(owner, tensor, what)
    if tensor.is_complex() or tensor.layout is not torch.strided or not tensor.is_floating_point():
        kind = "complex" if tensor.is_complex() else str(tensor.layout if tensor.is_floating_point() else tensor.dtype)
        raise TensorError(
            f"{owner}: a {what} of shape {tuple(tensor.shape)} is {kind}; only dense real floating-point tensors "
            "can be stepped (for an embedding, pass sparse=False; view complex tensors as real)"
        )


def tainted(loss: Tensor, other_loss: Tensor | float, other_gradient: Sequence[Tensor]) -> Tensor:
    """Return the loss that the step size comes from; not finite if that which the step goes along is not.

    In the 2-sample form the two come from different samples. Nothing is looked at here, so no device is waited for.
    """
    return loss + 0.0 * (other_loss + inner(other_gradient, other_gradient))


def slope_of(grads: Iterable[Tensor], directions: Iterable[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the slope <g, d> over all groups."""
    return inner(list(grads), list(directions), factors)


def gradients_of(chosen: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients of some of the parameters, zeros where there is none."""
    by_id = {id(p): g for p, g in zip(params, grads, strict=True)}
    return [torch.zeros_like(p) if (g := by_id[id(p)]) is None else g for p in chosen]
