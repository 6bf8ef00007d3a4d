"""A backward to all that a graph has, of which some tensors keep what they get."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .graph import nodes
from .interception import installed

__all__ = ["to_all_leaves"]


def to_all_leaves(
    loss: Tensor, inputs: Sequence[Tensor], written: list[Tensor], retain_graph: bool | None, create_graph: bool
) -> None:
    """Differentiate by all that a graph has; only the inputs keep what they get.

    For graphs of which a part is hidden, and for parameters in parts, which are in no graph: their modules put whole
    ones there, and bring the gradients of those to ``written``.
    """
    wanted = {id(p) for p in inputs}
    leaves = [*written, *(getattr(node, "variable", None) for node in nodes([loss.grad_fn]))]
    found = [leaf for leaf in leaves if leaf is not None and id(leaf) not in wanted]
    held = [(p, p.grad) for p in found]
    try:
        for p in found:
            p.grad = None
        installed.backward(loss, retain_graph=retain_graph, create_graph=create_graph)
    finally:
        for p, grad in held:
            p.grad = grad
