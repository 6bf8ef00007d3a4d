"""Trees of tensors, as TorchOpt's transformations take them: their slopes, scaled, cloned, one or the other."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from adaptive_bilevel.errors import TensorError
from adaptive_bilevel.evaluation.parts import require_whole
from adaptive_bilevel.evaluation.vectors import inner

from ._host import Tree, torchopt
from .refusals import IN_PARTS

__all__ = ["cloned", "either", "scaled", "slope_along", "tree_leaves"]

T = TypeVar("T")


def tree_leaves(tree: Tree) -> list[Tensor | None]:
    """Return the leaves of a tree, None included."""
    return list(torchopt.pytree.tree_leaves(tree, none_is_leaf=True))


def slope_along(owner: str, grads: Tree, directions: Tree) -> Tensor:
    """Return <grads, directions> of two trees, over the leaves of which neither is None.

    Raises:
        TensorError: Their leaves do not fit, or are in parts.
    """
    left, right = tree_leaves(grads), tree_leaves(directions)
    require_whole(owner, left, IN_PARTS)
    pairs = [(g, d) for g, d in zip(left, right, strict=False) if g is not None and d is not None]
    if len(left) != len(right) or any(g.shape != d.shape for g, d in pairs):
        shapes = [[None if t is None else tuple(t.shape) for t in leaves] for leaves in (left, right)]
        raise TensorError(
            f"{owner}: gradients of shapes {shapes[0]} for directions of shapes {shapes[1]}; pass one for each"
        )
    return inner([g for g, _ in pairs], [d for _, d in pairs])


def scaled(updates: Tree, step: Tensor | float, inplace: bool) -> Tree:
    """Return the updates times the step; zeros for a step of 0, whatever the updates are."""

    def scale(u: Tensor) -> Tensor:
        if isinstance(step, Tensor):
            length = step.to(device=u.device, dtype=u.dtype)
            multiple = torch.where(length > 0, u * length, torch.zeros_like(u))
            return u.copy_(multiple) if inplace else multiple
        if step == 0.0:
            return u.zero_() if inplace else torch.zeros_like(u)
        return u.mul_(step) if inplace else u.mul(step)

    return torchopt.pytree.tree_map(scale, updates)


def cloned(tree: Tree) -> Tree:
    """Return the tree with copies of its tensors."""
    return torchopt.pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def either(condition: Tensor | bool, left: T, right: T) -> T | Tensor:
    """Return `left` where the condition holds, else `right`; under a condition that is a tensor, tensors only."""
    if not isinstance(condition, Tensor):
        return left if condition else right
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.where(condition.to(left.device), left, right)
    return left
