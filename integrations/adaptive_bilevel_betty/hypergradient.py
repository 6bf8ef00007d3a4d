"""A hypergradient type for Betty, ``Config(type="adaptive_cg")``, with the linear solvers of the core.

Betty's ``cg`` uses the old residual in the update of the direction, in both releases. Its error does not vanish.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError, warn
from adaptive_bilevel.evaluation.guard import Guard, Workspace
from adaptive_bilevel.hypergradient.curvature import LowerCurvature, unconnected
from adaptive_bilevel.hypergradient.shared_basis import solve
from adaptive_bilevel.hypergradient.solution import report

from .bound_problem import BoundProblem
from .release import Problem, answering, jvp_fn_mapping
from .total_derivative import total_loss

__all__ = ["TYPE", "adaptive_cg", "register"]

TYPE = "adaptive_cg"


def adaptive_cg(
    vector: Sequence[Tensor], curr: Problem, prev: Problem, sync: bool = False
) -> tuple[Tensor, ...] | None:
    """Return -C P `vector`, the hypergradient of a function of `curr`'s solution for `prev`'s parameters.

    C and P belong to the loss of `curr` on the batches of its last step (all of them, with gradient accumulation), with
    the same dropout masks. The response of `BiSLS` and the hypergradient then have the same inverse. If there are
    problems below `curr`, its loss includes their response (see `total_derivative`).

    Args:
        vector: Gradient by the parameters of `curr`, or by its ``meta_trainable_parameters`` if it is the lowest.
        curr: The lower problem.
        prev: The upper problem.
        sync: For Betty 0.2: add the result to .grad of `prev` and return None.

    Raises:
        LowerLevelError: `curr` is not bound.

    Warns:
        AdaptiveBilevelWarning: As `implicit`.
    """
    lower_problem = BoundProblem.of(curr)
    upper, lower = list(prev.trainable_parameters()), answering(curr)
    if len(vector) != len(lower):  # from a problem below, where Betty differentiates by all parameters of this one
        lower = list(curr.trainable_parameters())
    before, solver = lower_problem.log.snapshot(), lower_problem.solver
    try:
        with Guard([*upper, *lower], Workspace()) as guard, torch.enable_grad():
            loss = guard.attached(lambda: total_loss(lower_problem))
            guard.mark()
            curvature = LowerCurvature(loss, upper, lower)
            solution = solve(solver, curvature.hvp, vector, lower, loss.detach(), lower_problem.solution)
            change = torch._foreach_neg(list(curvature.cross_vjp(solution.tensors)))
    finally:
        before.restore()
    if not curvature.mixed:
        warn(f"problem {curr.name!r} below {prev.name!r}: {unconnected(True)}.")
    report(solver, solution, change)
    if solver.warm_start:
        lower_problem.solution = solution.tensors
    if not sync:
        return tuple(change)
    prev.set_grads(upper, change)
    return None


def register() -> None:
    """Make the type known to Betty, under a name of its own.

    Raises:
        OptionError: Somebody else's type has that name.
    """
    if jvp_fn_mapping.setdefault(TYPE, adaptive_cg) is not adaptive_cg:
        raise OptionError(f"betty.hypergradient.jvp_fn_mapping[{TYPE!r}] is {jvp_fn_mapping[TYPE]!r}: rename yours")
