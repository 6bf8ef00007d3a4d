"""The loss of a problem as a function of its variable alone, the problems below answering to every change.

With l(y, z) the loss of a problem and z*(y) the solution of the one below, what its variable minimizes is l(y, z*(y)).
Hypergradients through that problem need second derivatives of this, not of l at a fixed z. They are those of
l(y, z_2(y)), where z_2 is two chord steps from the present z,

    z_{i+1} = z_i - P grad_z g(y, z_i),    P the inverse Hessian of g at the present point, taken as constant:

each step squares the order to which the derivatives of z_i(y) are those of z*(y), at a solved z and with an exact P.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.hypergradient.curvature import LowerCurvature

from .bound_problem import BoundProblem
from .release import Problem

__all__ = ["total_loss"]

CHORD_STEPS = 2
"""For second derivatives."""


def total_loss(bound_problem: BoundProblem) -> Tensor:
    """Return the loss of a bound problem, attached, as a function of its variable and of those above."""
    with contextlib.ExitStack() as placed:
        for below in bound_problem.below():
            placed.enter_context(_placed(below.problem, _solution(below)))
        return bound_problem.log.replay()


def _solution(bound_problem: BoundProblem) -> list[Tensor]:
    """Return z_2, attached to all that the problem's loss depends on."""
    present = _variable(bound_problem.problem)
    inverse = _inverse(bound_problem.solver, LowerCurvature(total_loss(bound_problem), [], present))
    z: list[Tensor] = [p.detach().requires_grad_() for p in present]
    for _ in range(CHORD_STEPS):
        with _placed(bound_problem.problem, z):
            loss = total_loss(bound_problem)
        slopes = torch.autograd.grad(loss, z, create_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if slope is None else slope for p, slope in zip(z, slopes, strict=True)]
        z = [p - step for p, step in zip(z, _apply(inverse, filled), strict=True)]
    return z


def _inverse(solver: LinearSolver, curvature: LowerCurvature) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *b: tuple(solver.solve(curvature.hvp, b).tensors)


class _Linear(torch.autograd.Function):
    """A symmetric linear map, given as a function of no graph."""

    @staticmethod
    def forward(ctx: Any, linear: Callable[..., tuple[Tensor, ...]], *b: Tensor) -> tuple[Tensor, ...]:
        """Return the map of b."""
        ctx.linear = linear
        return linear(*(t.detach() for t in b))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the map of the gradients: it is its own transpose."""
        return (None, *_apply(ctx.linear, grads))


def _apply(linear: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    applied: tuple[Tensor, ...] = cast(Any, _Linear).apply(linear, *tensors)
    return applied


def _variable(problem: Problem) -> list[Tensor]:
    """Return what the problem solves for; other parameters of its module may require gradients, too."""
    return [p for p in problem.trainable_parameters() if p.requires_grad]


@contextlib.contextmanager
def _placed(problem: Problem, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have tensors in the place of the problem's variable, in order."""
    module: nn.Module = problem.module
    places = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    order = {id(p): i for i, p in enumerate(_variable(problem))}
    try:
        for part, name, p in places:
            if id(p) in order:
                part._parameters[name] = tensors[order[id(p)]]  # type: ignore[assignment]
        yield
    finally:
        for part, name, p in places:
            part._parameters[name] = p
