"""Writing a hypergradient to where the bilevel optimizers read it."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError

from .trees import Tree, flatten

__all__ = ["assign"]


def assign(upper: Tree, hypergradient: Tree) -> None:
    """Write ``hypergradient`` into ``.grad`` of the upper tensors, where the bilevel optimizers read it.

    Args:
        upper: The tensors of x, arranged as they were for `implicit`. Frozen ones keep what they have. A slice of one
            (``x[:3]``, ``x[:, 0]``) stands for these entries: the others keep what ``.grad`` holds, zeros if nothing.
        hypergradient: What `implicit` returned, or any tensors of these shapes. One with a graph is detached.

    Raises:
        HypergradientError: The number or the shapes of the tensors differ, or a tensor is no parameter and no slice of
            one (what an index list, a mask or arithmetic returns is a copy). Nothing is written then.

    >>> import torch
    >>> x = torch.zeros(2, requires_grad=True)
    >>> assign([x], (torch.ones(2),))
    >>> x.grad
    tensor([1., 1.])
    >>> assign([x[:1]], (torch.tensor([3.0]),))
    >>> x.grad
    tensor([3., 1.])
    """
    x, _ = flatten(upper, "upper")
    h, _ = flatten(hypergradient, "hypergradient")
    if len(x) != len(h) or any(a.shape != b.shape for a, b in zip(x, h, strict=False)):
        raise HypergradientError(
            f"hypergradient has shapes {[tuple(t.shape) for t in h]}, upper has {[tuple(t.shape) for t in x]}: "
            "pass what implicit() returned for the same tensors."
        )
    for index, tensor in enumerate(x):
        if not tensor.is_leaf and _whole(tensor) is None:
            raise HypergradientError(
                f"upper[{index}] is no parameter and no slice of one, but computed from it: pass the parameter itself, "
                "with a hypergradient of zeros where there is none, or a slice such as x[:3]."
            )
    with torch.no_grad():
        for tensor, part in zip(x, h, strict=True):
            whole = _whole(tensor)
            if whole is not None:
                if whole.grad is None:
                    whole.grad = torch.zeros_like(whole)
                _entries(whole, tensor).copy_(part)
            elif tensor.requires_grad:
                tensor.grad = part.detach().to(tensor, copy=True)


def _whole(tensor: Tensor) -> Tensor | None:
    """Return the trainable parameter that a tensor is a slice of; None: it is none."""
    base = tensor._base
    return base if base is not None and base.is_leaf and base.requires_grad else None


def _entries(whole: Tensor, part: Tensor) -> Tensor:
    """Return the entries of the parameter's ``.grad`` where a slice of the parameter has its own."""
    grad = whole.grad
    assert grad is not None
    if grad.stride() != whole.stride():  # another layout, or a parameter with gaps
        laid = torch.empty_strided(whole.size(), whole.stride(), dtype=whole.dtype, device=whole.device)
        whole.grad = grad = laid.copy_(grad)
    offset = part.storage_offset() - whole.storage_offset() + grad.storage_offset()
    return grad.as_strided(part.size(), part.stride(), offset)
