"""Arithmetic on each tensor of a list, by torch's fused functions; of a DTensor, on the part that is here.

The functions are those of torch without their prefix: ``add`` is ``torch._foreach_add``. Lists may hold whole tensors
and parts side by side. What is returned is laid out as the first list.
"""

# torch._foreach_* has no public name, and torch.optim itself is built on it.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .parts import any_in_parts, form, formed, part

__all__ = [
    "add",
    "add_",
    "addcmul_",
    "copy_",
    "div",
    "div_",
    "lerp",
    "mul",
    "mul_",
    "neg",
    "sqrt_",
    "sub",
    "sub_",
]


def _on_parts(operation: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Return the function on lists of tensors; one that changes its first list returns that."""

    def apply(tensors: Sequence[Tensor], *others: Any, **options: Any) -> list[Tensor]:
        first = list(tensors)
        if not any_in_parts(first):
            found = operation(first, *(list(o) if isinstance(o, tuple) else o for o in others), **options)
            return first if found is None else list(found)
        lists = [list(map(part, o)) if isinstance(o, (list, tuple)) else o for o in others]
        found = operation(list(map(part, first)), *lists, **options)
        return first if found is None else list(map(formed, found, map(form, first)))

    return apply


add = _on_parts(torch._foreach_add)
add_ = _on_parts(torch._foreach_add_)
addcmul_ = _on_parts(torch._foreach_addcmul_)
copy_ = _on_parts(torch._foreach_copy_)
div = _on_parts(torch._foreach_div)
div_ = _on_parts(torch._foreach_div_)
lerp = _on_parts(torch._foreach_lerp)
mul = _on_parts(torch._foreach_mul)
mul_ = _on_parts(torch._foreach_mul_)
neg = _on_parts(torch._foreach_neg)
sqrt_ = _on_parts(torch._foreach_sqrt_)
sub = _on_parts(torch._foreach_sub)
sub_ = _on_parts(torch._foreach_sub_)
