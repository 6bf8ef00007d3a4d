"""How the lower variable answers to a move of the upper one: the searched function of an upper step.

An upper search needs phi(a) = f(x - a d, y(a)). The two ways to model y(a):

* `TangentResponse`: y + a w with w = P C^T d, along the tangent of y*(x - a d). The slope of phi at 0 is exactly -s,
  s = <f_x, d> - <f_y, w>, whatever the quality of P, so small steps always pass, and a trial costs one value of f.
  A solver that does not know how far it is from the inverse (identity, a random draw) serves a hypergradient, where
  the direction counts, but says nothing of how far y goes: then P is `CG`, as long as d descends along that.
* `StepResponse`: one more lower step at x - a d, as in Fan et al. (2023), eq. (14). Its slope is not that of the
  hypergradient, so every step may fail, and an accepted one may raise F; kept for comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..evaluation.counts import Counts
from ..evaluation.guard import Guard
from ..evaluation.reductions import agree
from ..evaluation.vectors import inner
from ..hypergradient import CG, Identity, LinearSolver, Neumann
from ..hypergradient.curvature import LowerCurvature
from ..hypergradient.solution import Refinable
from ..optim.base import Sample
from .model_check import Adjoint, Belief, Change

__all__ = ["NoResponse", "Response", "StepResponse", "TangentResponse", "is_blind", "refined"]


class Response(Protocol):
    """The searched function's lower part."""

    slope: float

    @property
    def offsets(self) -> Sequence[Tensor] | None:
        """How y answers to one unit of the step; None: not known."""
        ...

    def close(self) -> None:
        """Get ready for trials."""
        ...

    def answer(self, step: float) -> None:
        """Put the lower variable to y(step), the upper one being at x - step d."""
        ...

    def certify(self, step: float, surplus: float, place: Callable[[float], None]) -> bool:
        """Return whether the model of y can be believed at this step.

        The candidate is in place, with phi `surplus` below what the search asks for; `place` puts another one there.
        """
        ...


class NoResponse:
    """f does not need the lower variable: phi(a) = f(x - a d)."""

    offsets: Sequence[Tensor] | None = None

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def close(self) -> None:
        """Do nothing."""

    def answer(self, step: float) -> None:
        """Do nothing."""

    def certify(self, step: float, surplus: float, place: Callable[[float], None]) -> bool:
        """Believe."""
        return True


class TangentResponse:
    """y(a) = y + a w, w = P C^T d.

    Args:
        guard: The step's guard.
        samples: The lower samples, frozen.
        upper: The upper tensors that move.
        lower: The lower tensors.
        partials: f_x (of those upper tensors) and f_y.
        solver: P, if it knows how near it is.
        belief: In the tangent.
        counts: Where lower oracle calls are counted.
    """

    def __init__(
        self,
        guard: Guard,
        samples: Sequence[Sample],
        upper: Sequence[Tensor],
        lower: Sequence[Tensor],
        partials: tuple[Sequence[Tensor], Sequence[Tensor]],
        solver: LinearSolver,
        belief: Belief,
        counts: Counts,
    ) -> None:
        self._guard, self._samples, self._lower, self._counts = guard, samples, lower, counts
        self._partials, self._belief = partials, belief
        self._upper = upper
        self._curvature = self._differentiated()
        self.offsets: Sequence[Tensor] | None = None
        self._take(solver)

    def _take(self, solver: LinearSolver) -> None:
        """Prepare to solve."""
        self.slope = 0.0
        self._solvers: list[LinearSolver] = [CG(), solver] if is_blind(solver) else [solver]
        self._adjoint = Adjoint(self._partials[1]) if isinstance(self._solvers[0], CG) else None
        self._refinements = 0

    def along(self, direction: Sequence[Tensor]) -> None:
        """Set w and the slope s for a direction d."""
        with torch.enable_grad():
            self._push_forward(direction)
            self._solve(direction, self._solvers[0])
            finer = refined(self._solvers[0])
            if self.slope <= 0.0 and finer is not None:
                # The solver's error may have the last word on the sign: solve further once, then decide.
                self._solve(direction, finer, again=True)
            if self.slope <= 0.0 and len(self._solvers) > 1:
                self._solvers, self._adjoint = self._solvers[1:], None
                self._solve(direction, self._solvers[0])

    def _differentiated(self) -> LowerCurvature:
        with torch.enable_grad():
            losses = [self._guard.attached(sample.closure, sample.random) for sample in self._samples]
            total = torch.stack([loss.reshape(()) for loss in losses]).sum()
            return LowerCurvature(total, self._upper, self._lower, moves=True)

    def _push_forward(self, direction: Sequence[Tensor]) -> None:
        if self._refinements > 0:
            self._drop_graph()  # it has forgotten the loss, and a projection may have written to x meanwhile
            self.offsets, self._curvature = None, self._differentiated()
        self._push = self._curvature.cross_jvp(direction)
        self._curvature.forget_loss()

    def _solve(self, direction: Sequence[Tensor], solver: LinearSolver, *, again: bool = False) -> None:
        """Set w and s; `again`: starting from the last w."""
        f_x, f_y = self._partials
        product = self._curvature.hvp if self._adjoint is None else self._adjoint.observing(self._curvature.hvp)
        solution = solver.solve(product, self._push, self.offsets if again else None)
        self.offsets = solution.tensors
        # A solver that does not know how far it is from the inverse gets no allowance for it.
        self._residual = 0.0 if math.isnan(solution.residual) else solution.residual
        self.slope = float(agree(inner(f_x, direction) - inner(f_y, solution.tensors))[0])

    def refine(self) -> bool:
        """Solve further from now on; False where that is not possible, or was asked for twice already."""
        finer = refined(self._solvers[0])
        if finer is None or self._refinements == 2:
            return False
        self._solvers[0], self._refinements = finer, self._refinements + 1
        return True

    def hypergradient(self) -> list[Tensor]:
        """Return f_x - C P f_y."""
        f_x, f_y = self._partials
        with torch.enable_grad():
            solution = self._solvers[0].solve(self._curvature.hvp, f_y)
            return list(torch._foreach_sub(list(f_x), list(self._curvature.cross_vjp(solution.tensors))))

    def close(self) -> None:
        """Drop the graph and what only solves need: parameters are about to move."""
        self._gradient = self._curvature.gradient
        self._drop_graph()
        del self._partials

    def _drop_graph(self) -> None:
        self._counts.gradients += self._curvature.gradients
        self._counts.hvps += self._curvature.hvps
        self._counts.jvps += self._curvature.jvps
        del self._curvature

    def answer(self, step: float) -> None:
        """Move y by step * w (it is at y)."""
        assert self.offsets is not None
        torch._foreach_add_(list(self._lower), list(self.offsets), alpha=step)

    def certify(self, step: float, surplus: float, place: Callable[[float], None]) -> bool:
        """Return whether the tangent can be believed, see `adaptive_bilevel.bilevel.model_check`."""
        adjoint = self._adjoint
        if adjoint is None:
            return self._belief(step, self._change, place)
        return self._belief(
            step, self._change, place, lambda: adjoint.correction(self._moved, self._gradient) <= surplus
        )

    def _change(self) -> list[Change]:
        """Return how far the lower gradient is from where it was."""
        moved: list[Tensor] | None = None
        for sample in self._samples:
            _, grads = self._guard.gradient(sample.closure, self._lower, sample.random)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self._lower, grads, strict=True)]
            moved = filled if moved is None else list(torch._foreach_add(moved, filled))
        self._counts.gradients += 1
        assert moved is not None
        self._moved = moved
        return [Change.between(self._gradient, moved, self._push, self._residual)]


def is_blind(solver: LinearSolver) -> bool:
    """Return whether the solver does not know how far it is from the inverse."""
    return isinstance(solver, Identity) or bool(getattr(solver, "resamples", False))


def refined(solver: LinearSolver) -> LinearSolver | None:
    """Return the solver solving further: CG to a tenth of the tolerance, Neumann with twice the terms; else None."""
    if isinstance(solver, Refinable):
        return solver.refined()
    if isinstance(solver, CG):
        return dataclasses.replace(solver, tolerance=solver.tolerance / 10, max_iterations=2 * solver.max_iterations)
    if isinstance(solver, Neumann) and not solver.random:
        return dataclasses.replace(solver, steps=2 * solver.steps + 1)
    return None


class StepResponse:
    """y(a) = y - beta grad_y g(x - a d, y), `steps` times: Fan et al. (2023), Algorithm 2, line 14.

    Args:
        guard: The step's guard.
        samples: The lower samples, frozen, with the last lower step beta of each.
        lower: The lower tensors.
        slope: <h, d>, with h the user's hypergradient.
        steps: Number of lower steps.
        counts: Where lower oracle calls are counted.
    """

    offsets: Sequence[Tensor] | None = None

    def __init__(
        self,
        guard: Guard,
        samples: Sequence[Sample],
        lower: Sequence[Tensor],
        slope: float,
        steps: int,
        counts: Counts,
    ) -> None:
        self._guard, self._samples, self._lower, self._counts = guard, samples, lower, counts
        self._steps = steps
        self.slope = slope

    def close(self) -> None:
        """Do nothing."""

    def answer(self, step: float) -> None:
        """Take the lower steps at the present x."""
        for _ in range(self._steps):
            gradients = [self._guard.gradient(s.closure, self._lower, s.random)[1] for s in self._samples]
            self._counts.gradients += 1
            for sample, grads in zip(self._samples, gradients, strict=True):
                for p, g in zip(self._lower, grads, strict=True):
                    if g is not None:
                        p.add_(g, alpha=-sample.step_size)

    def certify(self, step: float, surplus: float, place: Callable[[float], None]) -> bool:
        """Believe, as the paper does."""
        return True
