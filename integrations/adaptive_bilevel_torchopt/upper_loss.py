"""The upper loss at a solution: evaluated once, and differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, final

from torch import Tensor

from adaptive_bilevel.errors import HypergradientError
from adaptive_bilevel.evaluation import Evaluated, Evaluations, Objective
from adaptive_bilevel.evaluation.guard import Closure, Guard

from .earlier import now, refuse_earlier, refuse_replaced
from .hypergradient import in_parts, whole
from .lower_level import SolvedLevel
from .task import SolvedProblem

__all__ = ["Differentiated", "UpperLoss", "differentiate"]


@final
class UpperLoss(Objective):
    """An upper loss with the partial gradients that came with TorchOpt's hypergradient.

    Args:
        closure: Returns the loss.
        loss: Its value where the step begins, detached.
        gradients: The partial gradients by the ids of upper parameters and solutions.
    """

    def __init__(self, closure: Closure, loss: Tensor, gradients: dict[int, Tensor | None]) -> None:
        self._closure, self._loss, self._gradients = closure, loss, gradients

    @property
    def source(self) -> object:
        """The closure."""
        return self._closure

    def __call__(self) -> object:
        """Return the loss at the parameters as they are."""
        return self._closure()

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated:
        """Return loss and partial gradients where the step begins."""
        return Evaluated(self._loss, [self._gradients.get(id(t)) for t in tensors])


class Differentiated(NamedTuple):
    """An upper loss where the step begins.

    Attributes:
        loss: f, detached.
        hypergradient: h, one for each upper parameter; None where there is none.
        objective: f with its partial gradients; None where the step does not need them.
        registered: The upper tensors that TorchOpt differentiates by; found at a first step only.
    """

    loss: Tensor
    hypergradient: list[Tensor | None]
    objective: UpperLoss | None
    registered: list[Tensor]


def differentiate(
    guard: Guard,
    closure: Closure,
    params: Sequence[Tensor],
    levels: Sequence[tuple[SolvedLevel, Sequence[SolvedProblem]]],
    counts: Evaluations,
    *,
    searching: bool,
    first: bool,
) -> Differentiated:
    """Evaluate an upper loss, raise an error if its hypergradient would be wrong, and differentiate it.

    Args:
        guard: The step's guard; buffers and random state after the evaluation are marked.
        closure: Returns the loss.
        params: The upper parameters.
        levels: The lower levels with their problems, attached to TorchOpt's graph.
        counts: Of the upper step.
        searching: Whether the partial gradients are needed, and the closure is evaluated elsewhere.
        first: Whether to look at what TorchOpt differentiates by.
    """
    problems = [problem for _, each in levels for problem in each]
    solutions = [p for problem in problems for p in problem.tensors]
    since = now() if searching else 0
    loss = guard.attached(closure)
    guard.mark()
    _refuse_solved_inside([level for level, _ in levels], solutions)
    if replaced := [node for problem in problems for node in problem.staleness.replaced]:
        refuse_replaced(loss, replaced)
    if searching:

        def again() -> Tensor:
            counts.upper.values += 1
            return guard.attached(closure, guard.entry)

        refuse_earlier(loss, since, params, solutions, again)
    with ExitStack() as contexts:
        for level, _ in levels:
            contexts.enter_context(level.backward())
        registered = [x for level, each in levels for x in level.registered(each)] if first else []
        if not searching:
            return Differentiated(loss.detach(), whole(loss, params), None, registered)
        parts = in_parts(loss, params, solutions)
    partial = dict(zip(map(id, [*params, *solutions]), [*parts.f_x, *parts.f_y], strict=True))
    return Differentiated(loss.detach(), parts.hypergradient, UpperLoss(closure, loss.detach(), partial), registered)


def _refuse_solved_inside(levels: Sequence[SolvedLevel], solutions: Sequence[Tensor]) -> None:
    known = {id(p) for p in solutions}
    for level in levels:
        if level.module is not None and any(id(p) not in known for p in level.module.parameters()):
            raise HypergradientError(
                "UpperStep: the closure called solve(), which every trial would do again. Call it before step()"
            )
