"""The nodes of a graph of autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["nodes"]


def nodes(start: Iterable[Any], ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Yield each node that is reached from some nodes, once, as it is met; the leaf of a node is its ``variable``.

    Args:
        start: Where to start; None is left out.
        ends: Whether a node is not gone beyond. It is yielded, too.
    """
    seen, waiting = set[Any](), list(start)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not ends(node):
            waiting += [following for following, _ in node.next_functions]
