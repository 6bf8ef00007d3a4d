"""Linear solvers as plain text: Betty builds an optimizer anew from its ``defaults``, which are numbers and strings."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TypeGuard

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG, Identity, Lanczos, LinearSolver, Neumann

__all__ = ["SolverOption", "solver_from", "solver_text"]

_SOLVERS: dict[str, type[Lanczos] | type[CG] | type[Neumann] | type[Identity]] = {
    solver.__name__: solver for solver in (Lanczos, CG, Neumann, Identity)
}
_REMEDY = (
    "give Lanczos(...), CG(...), Neumann(...) without generator, or Identity(...), or the same as a string, e.g. "
    "'CG(max_iterations=50)'; any other solver can be set after Engine(...): problem.optimizer.solver = ..."
)


def solver_from(solver: object) -> LinearSolver:
    """Return the solver that an option names: a solver, what `solver_text` wrote, or None for Lanczos().

    Raises:
        OptionError: It is something else, or cannot be written as plain values.

    >>> solver_from("CG(max_iterations=3)")
    CG(max_iterations=3, tolerance=0.1, warm_start=False)
    """
    if solver is None:
        return Lanczos()
    if isinstance(solver, str):
        solver = _parse(solver)
    if not _is_writable(solver):
        raise OptionError(f"BiSLS(solver={solver!r}): Betty builds optimizers anew from plain values; {_REMEDY}")
    return solver


def _is_writable(solver: object) -> TypeGuard[LinearSolver]:
    plain = all(getattr(solver, name, None) is None for name in ("generator", "dtype"))
    return plain and type(solver) in _SOLVERS.values()


def solver_text(solver: LinearSolver) -> str | None:
    """Return the solver as plain text; None if it cannot be written so.

    >>> solver_text(Neumann(5, 0.1))
    'Neumann(steps=5, scale=0.1, random=False, generator=None)'
    """
    try:
        return repr(solver_from(repr(solver)))
    except OptionError:
        return None


def _parse(text: str) -> LinearSolver:
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


@dataclass(frozen=True, kw_only=True)
class SolverOption:
    """The solver as an option of `BiSLS`.

    Attributes:
        solver: As plain text, as options are saved; None: it cannot be written so. Another text than that of `used`
            replaces it.
        used: The solver. One that cannot be written is not saved, and stays when others load.
    """

    solver: str | None
    used: LinearSolver = field(metadata={"option": False})

    @classmethod
    def of(cls, solver: LinearSolver) -> SolverOption:
        """Return the option for a solver."""
        return cls(solver=solver_text(solver), used=solver)

    def __post_init__(self) -> None:
        """Set both to the same solver."""
        text = solver_text(self.used)
        if self.solver is not None and self.solver != text:
            object.__setattr__(self, "used", solver_from(self.solver))
        else:
            object.__setattr__(self, "solver", text)
