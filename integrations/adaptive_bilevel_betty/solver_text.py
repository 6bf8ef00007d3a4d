"""Linear solvers as plain text: Betty builds an optimizer anew from its ``defaults``, which are numbers and strings."""

from __future__ import annotations

import ast
from typing import Any

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG, Identity, LinearSolver, Neumann

__all__ = ["solver_from", "solver_text"]

_SOLVERS: dict[str, Any] = {solver.__name__: solver for solver in (CG, Neumann, Identity)}
_REMEDY = (
    "give CG(...), Neumann(...) without generator, or Identity(...), or the same as a string, e.g. "
    "'CG(max_iterations=50)'; any other solver can be set after Engine(...): problem.optimizer.solver = ..."
)


def solver_from(solver: Any) -> LinearSolver:
    """Return the solver that an option names: a solver, what `solver_text` wrote, or None for CG().

    Raises:
        OptionError: It is something else, or cannot be written as plain values.

    >>> solver_from("CG(max_iterations=3)")
    CG(max_iterations=3, tolerance=0.1, warm_start=False)
    """
    if solver is None:
        return CG()
    if isinstance(solver, str):
        solver = _parse(solver)
    if type(solver) not in _SOLVERS.values() or getattr(solver, "generator", None) is not None:
        raise OptionError(f"BiSLS(solver={solver!r}): Betty builds optimizers anew from plain values; {_REMEDY}")
    return solver  # type: ignore[no-any-return]


def solver_text(solver: LinearSolver) -> str | None:
    """Return the solver as plain text; None if it cannot be written so.

    >>> solver_text(Neumann(5, 0.1))
    'Neumann(steps=5, scale=0.1, random=False, generator=None)'
    """
    try:
        return repr(solver_from(repr(solver)))
    except OptionError:
        return None


def _parse(text: str) -> Any:
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _SOLVERS):
            raise ValueError
        positional = [ast.literal_eval(value) for value in call.args]
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
        return _SOLVERS[call.func.id](*positional, **options)
    except OptionError:
        raise
    except (SyntaxError, ValueError, TypeError):
        raise OptionError(f"BiSLS(solver={text!r}): not a solver; {_REMEDY}") from None
