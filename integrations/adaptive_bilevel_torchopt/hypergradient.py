"""The hypergradient of an upper loss, as one backward through ``solve()`` finds it: whole, or with its parts.

The parts are f_x and f_y, which a search needs, and what TorchOpt's node adds to f_x. All are there in the one backward
that TorchOpt itself does: the graph of the loss ends at the solutions, where f_y arrives, and TorchOpt's nodes stand
between the solutions and the upper parameters. While it runs, hooks keep aside what these nodes return, so that what
arrives at the upper parameters is f_x; the sum is taken afterwards, in the order in which autograd would have added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError, HypergradientError, SolverError
from adaptive_bilevel.evaluation.graph import nodes
from adaptive_bilevel.hypergradient import second_derivatives

from ._host import Node

__all__ = ["Parts", "computed_before", "explained", "gradients", "in_parts", "whole"]

Grads = Sequence[Tensor | None]


class Parts(NamedTuple):
    """A hypergradient and its parts; None for tensors that the loss does not depend on.

    Attributes:
        hypergradient: h, one for each upper parameter.
        f_x: Partial gradients by the upper parameters.
        f_y: Partial gradients by the solutions' tensors.
    """

    hypergradient: list[Tensor | None]
    f_x: list[Tensor | None]
    f_y: list[Tensor | None]


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of some tensors through ``solve()``; None where they depend on no such input.

    Raises:
        ClosureError: A part of them was computed and differentiated before.
        HypergradientError: The solver's argnums are not its first ones, or the lower objective draws random numbers or
            changes buffers where TorchOpt's backward cannot be made to see what the loop saw.
    """
    ones = [torch.ones_like(t) for t in outputs]
    random = torch.get_rng_state()
    try:
        found = torch.autograd.grad(list(outputs), list(inputs), ones, retain_graph=retain_graph, allow_unused=True)
    except IndexError as error:
        if not _raised_in_torchopt(error):
            raise
        raise HypergradientError(
            "UpperStep: TorchOpt's backward does not find the arguments that argnums names. It needs them to be the "
            "first ones of the solver after the lower parameters, as in custom_root(..., argnums=1) or (1, 2): put the "
            "upper arguments there"
        ) from error
    except RuntimeError as error:
        if (gone := explained(error)) is not None:
            raise gone from error
        if "mutate a captured Tensor" not in str(error):
            raise
        raise HypergradientError(
            "UpperStep: the lower objective changes a buffer (BatchNorm's running statistics in train mode?), which "
            "TorchOpt's backward refuses. Register the layer in the implicit module, where it is seen to; with a "
            "functional solver make it track_running_stats=False or .eval() it"
        ) from error
    if not torch.equal(random, torch.get_rng_state()):
        raise HypergradientError(
            "UpperStep: the lower objective draws random numbers (dropout?), and TorchOpt's backward drew other ones "
            "than the lower loop, so the hypergradient is that of another objective. Take a LowerStep in a module's "
            "solve(), with which they are drawn again, or .eval() the dropout layers"
        )
    return found


def whole(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the hypergradient as TorchOpt's users take it; None for parameters that the loss does not depend on.

    Raises:
        HypergradientError: It depends on none of them, or as for `gradients`.
    """
    active = [p for p in params if p.requires_grad]
    return _aligned(params, active, _required(gradients([loss], active)))


def in_parts(loss: Tensor, params: Sequence[Tensor], solutions: Sequence[Tensor]) -> Parts:
    """Return the hypergradient of a loss, and its parts.

    Args:
        loss: f, with its graph.
        params: x. What hooks of theirs do, they do to f_x and to h.
        solutions: The tensors of all lower solutions, attached to TorchOpt's graph.

    Raises:
        HypergradientError: The loss depends on no upper parameter, or as for `gradients`.
    """
    active = [p for p in params if p.requires_grad]
    hooked = [p for p in active if p._backward_hooks]
    implicit: list[tuple[int, Tensor]] = []
    with _aside(hooked), contextlib.ExitStack() as kept:
        for node, slots in _nodes_before(solutions, active):
            kept.callback(node.register_hook(_keeping(slots, implicit)).remove)
        found = gradients([loss], [*active, *solutions])
    f_x, f_y = list(found[: len(active)]), list(found[len(active) :])
    total = [None if g is None else g.clone() for g in f_x]  # not f_x itself: hooks of optimizers may write to .grad
    for index, part in implicit:
        before = total[index]
        total[index] = part if before is None else before.add_(part)
    _required(total)
    if hooked:
        f_x, total = _through_hooks(active, f_x), _through_hooks(active, total)
    return Parts(_aligned(params, active, total), _aligned(params, active, f_x), f_y)


def _required(found: Grads) -> Grads:
    if all(g is None for g in found):
        raise HypergradientError(
            "UpperStep: the upper loss depends on no meta-parameter, neither directly nor through solve(). Compute it "
            "from the module's parameters after solve(); with custom_root, pass them as an argument that argnums names"
        )
    return found


def _aligned(params: Sequence[Tensor], active: Sequence[Tensor], found: Grads) -> list[Tensor | None]:
    by_id = {id(p): g for p, g in zip(active, found, strict=True)}
    return [by_id.get(id(p)) for p in params]


Slots = list[tuple[int, int]]
"""Which of a node's outgoing gradients go to which upper parameter."""


def _nodes_before(solutions: Sequence[Tensor], params: Sequence[Tensor]) -> list[tuple[Node, Slots]]:
    """Return the nodes between the solutions and the upper parameters, with the slots that lead to the latter."""
    indices = {id(p): index for index, p in enumerate(params)}
    found: list[tuple[Node, Slots]] = []
    for node in nodes(p.grad_fn for p in solutions):
        leaves = [indices.get(id(getattr(n, "variable", None))) for n, _ in node.next_functions]
        if slots := [(slot, index) for slot, index in enumerate(leaves) if index is not None]:
            found.append((node, slots))
    return found


def _keeping(slots: Slots, implicit: list[tuple[int, Tensor]]) -> Callable[[Grads, Grads], tuple[Tensor | None, ...]]:
    """Return a hook that keeps aside what a node returns for upper parameters."""

    def keep(returned: Grads, arriving: Grads) -> tuple[Tensor | None, ...]:
        passed = list(returned)
        for slot, index in slots:
            part = passed[slot]
            if part is not None:
                implicit.append((index, part))
                passed[slot] = None
        return tuple(passed)

    return keep


@contextlib.contextmanager
def _aside(hooked: Sequence[Tensor]) -> Iterator[None]:
    """Take the hooks of some tensors away for a while."""
    held = [(p._backward_hooks, dict(p._backward_hooks)) for p in hooked if p._backward_hooks is not None]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def _through_hooks(params: Sequence[Tensor], found: Grads) -> list[Tensor | None]:
    """Return gradients as the hooks of the parameters leave them."""
    pairs = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
    given = [p for p, _ in pairs]
    after = iter(torch.autograd.grad(given, given, [g for _, g in pairs])) if pairs else iter(())
    return [None if g is None else next(after) for g in found]


def computed_before() -> ClosureError:
    """Return the error for a loss, or a part of it, from before the step."""
    return ClosureError(
        "UpperStep.step(closure=...): the loss that a closure returned, or a part of it, was computed before "
        "step(): no trial can change it, and its graph is gone after one backward. Compute all of it inside, as in "
        "meta.step(lambda: val(inner))"
    )


def explained(error: RuntimeError) -> ClosureError | SolverError | None:
    """Return the error in the place of one of autograd's: the graph is one from before the step, or cannot be used."""
    if "through the graph a second time" in str(error):
        return computed_before()
    return second_derivatives.explained(error, "UpperStep, through solve()")


def _raised_in_torchopt(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("torchopt.")
