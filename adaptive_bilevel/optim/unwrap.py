"""The optimizer inside of a trainer's wrapper: mixed-precision and distributed trainers hand out one around it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["unwrapped"]


def unwrapped(optimizer: Any) -> Any:
    """Return the innermost torch optimizer that a wrapper holds as ``optimizer``; anything else as it is.

    A wrapper's own attributes may be copies from when it was made. What an optimizer remembers (its record, its last
    closure) is current in the optimizer itself only.

    Args:
        optimizer: A torch optimizer, or an object around one.

    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> unwrapped(Wrapper(Wrapper(sgd))) is sgd
    True
    """
    found, node, seen = optimizer, optimizer, set[int]()
    while node is not None and id(node) not in seen:
        if isinstance(node, torch.optim.Optimizer):
            found = node
        seen.add(id(node))
        node = getattr(node, "optimizer", None)
    return found
