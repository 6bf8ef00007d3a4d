"""Parts of an upper loss from before the step, or on a solution that is gone: found by a walk through its graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError
from adaptive_bilevel.evaluation.graph import nodes

from ._host import Node
from .hypergradient import computed_before

__all__ = ["now", "refuse_earlier", "refuse_replaced"]


def now() -> int:
    """Return a number that is smaller than those of all nodes that this thread makes from now on."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    return node._sequence_nr()


def refuse_earlier(
    loss: Tensor, since: int, params: Iterable[Tensor], solutions: Iterable[Tensor], again: Callable[[], Tensor]
) -> None:
    """Reject an upper loss of which a part was computed before the step: no trial would change that part.

    Numbers of nodes count within a thread, so a node of another thread may look older than it is. What is older for
    certain is there again when the loss is computed again.

    Args:
        loss: The upper loss with its graph.
        since: What `now` returned before it was computed.
        params: The upper parameters.
        solutions: The tensors of the solutions.
        again: Computes the loss again; called if in doubt only.

    Raises:
        ClosureError: There is such a part, and it depends on an upper parameter or a solution.
    """
    known = {p.grad_fn for p in solutions if p.grad_fn is not None}
    reached = _reached([loss.grad_fn], lambda n: n in known or n._sequence_nr() < since)
    early = {n for n in reached if n._sequence_nr() < since} - known
    if not early:
        return
    uppers = {id(p) for p in params}
    early = {
        n for n in early if any(m in known or id(getattr(m, "variable", None)) in uppers for m in _reached([n], known))
    }
    if early and not early.isdisjoint(_reached([again().grad_fn], known)):
        raise computed_before()


def refuse_replaced(loss: Tensor, replaced: Sequence[Node]) -> None:
    """Reject an upper loss that reads a solution in whose place a later solve() has put another.

    Args:
        loss: The upper loss with its graph.
        replaced: The graph's nodes of such solutions.

    Raises:
        HypergradientError: There is such a solution: TorchOpt would differentiate it at the later one.
    """
    if not _reached([loss.grad_fn], ()).isdisjoint(replaced):
        raise HypergradientError(
            "UpperStep: the upper loss reads a solution whose memory a later solve() of the same module has taken, "
            "so its hypergradient is lost. One module serves one task of an upper step: make a module for each "
            "task and pass UpperStep(lower=[...]), or take a FunctionalLowerStep, whose solver may be called for "
            "each task"
        )


def _reached(start: Iterable[Node | None], ends: Callable[[Node], bool] | Collection[Node]) -> set[Node]:
    """Return the nodes that are reached from some of them.

    Args:
        start: Where to start.
        ends: Nodes that are reached and not gone beyond, as a set or by a test.
    """
    return set(nodes(start, ends if callable(ends) else ends.__contains__))
