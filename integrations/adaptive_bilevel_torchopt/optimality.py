"""A lower problem that is known by its optimality function only, as the response sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError, SolverError
from adaptive_bilevel.evaluation.vectors import inner

__all__ = ["local_objective", "refuse_asymmetric"]


def local_objective(closure: Callable[[], Any], params: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return a closure with the derivatives of a lower loss g at the present point, from r = grad_y g.

    It is <r, u> - <J^T u, u> / 2 with u = y - y0, zero at the present y0, and J = dr/dy: its gradient in y there is r,
    its Hessian J (which is symmetric for a gradient r), and its mixed derivative that of r. The value says nothing.

    Args:
        closure: Returns the optimality function's value, one tensor for each parameter; a loss is passed on.
        params: y, the tensors that the closure reads.
    """

    def loss() -> Tensor:
        returned = closure()
        if isinstance(returned, Tensor) and returned.dim() == 0:
            return returned
        values = _listed(returned, params)
        offset = [p - p.detach() for p in params]
        pulled = torch.autograd.grad(values, list(params), offset, create_graph=True)
        total = torch.zeros((), dtype=values[0].dtype, device=values[0].device)
        for r, j, u in zip(values, pulled, offset, strict=True):
            total = total + (r * u).sum() - 0.5 * (j * u).sum()
        return total

    return loss


def refuse_asymmetric(closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
    """Reject an optimality function that is no gradient, by one random pair of directions.

    Raises:
        SolverError: <u, J v> and <v, J u> differ.
    """
    returned = closure()
    if isinstance(returned, Tensor) and returned.dim() == 0:
        return
    values = _listed(returned, params)
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator).to(p) for p in params] for _ in range(2))
    ju, jv = (list(torch.autograd.grad(values, list(params), w, retain_graph=True)) for w in (u, v))
    left, right = float(inner(ju, v)), float(inner(jv, u))
    scale = max(float(inner(ju, ju)) * float(inner(v, v)), float(inner(jv, jv)) * float(inner(u, u))) ** 0.5
    if abs(left - right) > 1e-3 * scale:
        raise SolverError(
            "UpperStep: the module's optimality() is no gradient (its Jacobian is not symmetric), and the response's "
            "solvers need one. Define objective(), or take rule=BiSPS, which needs no response"
        )


def _listed(returned: Any, params: Sequence[Tensor]) -> list[Tensor]:
    values = [returned] if isinstance(returned, Tensor) else list(returned)
    if [r.shape for r in values] != [p.shape for p in params]:
        raise ClosureError(
            f"lower_closure returned tensors of shapes {[tuple(r.shape) for r in values]} for lower parameters of "
            f"shapes {[tuple(p.shape) for p in params]}: return the objective (a scalar), or what optimality() returns"
        )
    return values
