"""A module whose ``solve()`` keeps its own loop: seen from outside, and only the upper level stepped automatically."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from adaptive_bilevel.evaluation.guard import Closure
from adaptive_bilevel.hypergradient import LinearSolver

from ._host import Module
from .backward import as_differentiated
from .lower_level import SolvedLevel
from .refusals import check_lower, check_module, solution_of
from .solvers import declared_solver
from .staleness import StalenessCheck
from .task import SolvedProblem

__all__ = ["ExternalLoop"]


@final
class WatchedSolve:
    """The ``solve`` of one module, which remembers what it was called with and what it left.

    It stands in the module's instance, so that the class stays as it is.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self._shadowed = module.__dict__.get("solve")
        self.staleness = StalenessCheck()
        self.arguments: tuple[Sequence[object], Mapping[str, object]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Solve."""
        self.arguments = None
        self.staleness.begin(self.module.meta_parameters())
        if self._shadowed is not None:
            returned = self._shadowed(*args, **kwargs)
        else:
            returned = type(self.module).solve(self.module, *args, **kwargs)
        params = list(self.module.parameters())
        self.staleness.take(params)
        self.staleness.note(params)
        self.arguments = args, kwargs
        return returned

    def __getstate__(self) -> dict[str, object]:
        """Return what copying keeps: not the last call, since there is no graph either."""
        return {**self.__dict__, "arguments": None}


@final
class ExternalLoop(SolvedLevel):
    """A module whose ``solve()`` keeps its own loop: only the upper level is stepped automatically.

    Args:
        module: An ``ImplicitMetaGradientModule``, with an objective or with an optimality function only.
    """

    module: Module

    def __init__(self, module: Module) -> None:
        check_module("UpperStep", module, steps=False)
        check_lower("UpperStep", list(module.parameters()))
        self.module = module
        if not isinstance(module.__dict__.get("solve"), WatchedSolve):
            module.__dict__["solve"] = WatchedSolve(module)
        self._watched: WatchedSolve = module.__dict__["solve"]

    def solved(self, solution: object) -> list[SolvedProblem]:
        """Return the one lower problem, solved by the module's parameters."""
        params, staleness = solution_of(self.module, solution), self._watched.staleness
        staleness.check("UpperStep", params)
        return [SolvedProblem(params, staleness, closure=self._closure())]

    def _closure(self) -> Closure | None:
        """Return what TorchOpt differentiates, on what solve() was given; None if that was not seen."""
        if self._watched.arguments is None:
            return None
        args, kwargs = self._watched.arguments
        function = self.module.optimality if type(self.module)._custom_optimality else self.module.objective
        return lambda: function(*args, **kwargs)

    def backward(self) -> contextlib.AbstractContextManager[None]:
        """Let TorchOpt's backward leave BatchNorm's statistics alone."""
        return as_differentiated(self.module, None)

    def registered(self, problems: Sequence[SolvedProblem]) -> list[Tensor]:
        """Return the module's meta-parameters."""
        return list(self.module.meta_parameters())

    def solver(self) -> LinearSolver:
        """Return the solver of the declared kind."""
        return declared_solver(type(self.module).linear_solve, list(self.module.parameters()))

    def follow(self) -> None:
        """Do nothing: the loop has step sizes of its own."""

    def done(self) -> None:
        """Let go of the sample."""
        self._watched.arguments = None
