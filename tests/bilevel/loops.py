"""Ten iterations of training, for problems whose data are shared out among processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from adaptive_bilevel.hypergradient import Lanczos, assign, implicit

Run = Callable[[list[int], str], list[Tensor]]
"""From the shares of the data (one for each process) and how modules are wrapped, to the tensors of the end."""


def steps_below(problem: Callable[..., Any], make: Callable[..., Any], **options: Any) -> Run:
    """Return steps of the lower level.

    Args:
        problem: Of shares and wrapped.
        make: The optimizer, from the lower parameters.
        options: Of the problem.
    """

    def run(shares: list[int], wrapped: str) -> list[Tensor]:
        p = problem(shares, wrapped, **options)
        optimizer = make(p.y)
        for k in range(10):
            optimizer.step(partial(p.lower, k))
        found: list[Tensor] = p.tensors
        return found

    return run


def steps_above(
    problem: Callable[..., Any],
    make: Callable[..., Any],
    below: Callable[..., Any],
    solver: Any = None,
    products: str = "auto",
    **options: Any,
) -> Run:
    """Return upper steps after two lower steps each.

    Args:
        problem: Of shares and wrapped.
        make: The upper optimizer, from the upper parameters, the lower optimizer and the solver.
        below: The lower optimizer, from the lower parameters.
        solver: None: `Lanczos(4)`.
        products: Of `implicit`.
        options: Of the problem.
    """
    solver = Lanczos(4) if solver is None else solver

    def run(shares: list[int], wrapped: str) -> list[Tensor]:
        p = problem(shares, wrapped, **options)
        inner = below(p.y)
        outer = make(p.x, inner, solver)
        for k in range(10):
            for j in range(2):
                inner.step(partial(p.lower, 2 * k + j))
            upper, lower = partial(p.upper, k), partial(p.lower, 2 * k + 1)
            assign(p.x, implicit(upper, lower, p.x, p.y, solver, products=products))
            outer.step(upper)
        found: list[Tensor] = p.tensors
        return found

    return run
