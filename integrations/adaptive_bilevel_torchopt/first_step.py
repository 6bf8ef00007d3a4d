"""What a first upper step looks at: what TorchOpt takes for granted, or else its hypergradient would be wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError, warn
from adaptive_bilevel.evaluation.guard import Guard, Workspace
from adaptive_bilevel.evaluation.processes import ALONE
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.hypergradient.curvature import LowerCurvature, unconnected
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from .optimality import refuse_asymmetric
from .refusals import refuse_unregistered
from .solvers import Ridge, SafeNeumann
from .task import SolvedProblem

__all__ = ["agreed_solver", "look"]


def agreed_solver(declared: Sequence[LinearSolver]) -> LinearSolver:
    """Return the solver that all modules declare.

    Raises:
        OptionError: They declare different ones.
    """
    if any(other != declared[0] for other in declared):
        raise OptionError(
            f"UpperStep: the modules declare different linear solvers {declared}; pass solver= for the response"
        )
    return declared[0]


def look(
    upper: Sequence[Tensor],
    registered: Sequence[Tensor],
    problems: Sequence[SolvedProblem],
    declared: Sequence[LinearSolver],
    *,
    searching: bool,
) -> None:
    """Reject problems that TorchOpt differentiates wrongly, or that the response cannot be solved for.

    Args:
        upper: The upper parameters.
        registered: The upper tensors that TorchOpt differentiates by.
        problems: The lower problems, cut from the graph.
        declared: The solvers that the modules declare.
        searching: Whether there is a response.

    Raises:
        HypergradientError: The lower loss depends on upper parameters that TorchOpt does not differentiate by.
        SolverError: An optimality function is no gradient, or a Neumann series diverges.
    """
    lower = [p for problem in problems for p in problem.tensors]
    with Guard([*upper, *lower], Workspace(group=ALONE)) as guard:

        def total() -> Tensor:
            losses = [loss for problem in problems if (loss := _loss(guard, problem)) is not None]
            return torch.stack([loss.reshape(()) for loss in losses]).sum() if losses else torch.zeros(())

        for problem in problems:
            if searching and problem.task is None and problem.closure is not None:
                refuse_asymmetric(problem.closure, problem.tensors)
        refuse_unregistered(upper, registered, total)
        series = [s for s in declared if isinstance(s.solver if isinstance(s, Ridge) else s, SafeNeumann)]
        with torch.enable_grad():
            loss, ones = total(), tuple(torch.ones_like(p) for p in lower)
            if loss.requires_grad:
                curvature = LowerCurvature(loss, upper, lower)
                curvature.cross_vjp(ones)
                if not curvature.mixed:
                    warn(f"UpperStep: {unconnected(True)}.")
                if series:
                    series[0].solve(curvature.hvp, ones)
        guard.undo()


def _loss(guard: Guard, problem: SolvedProblem) -> Tensor | None:
    """Return the lower loss with its graph; None where it is not known."""
    given, optimizer = problem.objective, problem.optimizer
    if given is not None:
        return guard.attached(given)
    known = optimizer.sample if isinstance(optimizer, AdaptiveOptimizer) else None
    return None if known is None else guard.attached(known.closure, known.random)
