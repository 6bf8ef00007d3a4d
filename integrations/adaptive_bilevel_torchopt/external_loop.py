"""A module whose ``solve()`` keeps its own loop: seen from outside, and only the upper level stepped automatically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .marks import Marks
from .refusals import attached, check_lower, check_module, refuse_solution
from .task import ModuleLower

__all__ = ["StockLower"]


class SeenSolve:
    """The ``solve`` of one module, which remembers what it was called with and what it left.

    It stands in the module's instance, so that the class stays as it is.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._shadowed = module.__dict__.get("solve")
        self.marks = Marks()
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Solve."""
        self.arguments = None
        self.marks.begin(self.module.meta_parameters())
        if self._shadowed is not None:
            returned = self._shadowed(*args, **kwargs)
        else:
            returned = type(self.module).solve(self.module, *args, **kwargs)
        params = list(self.module.parameters())
        self.marks.mark(params)
        self.marks.note(params)
        self.arguments = args, kwargs
        return returned

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying keeps: not the last call, since there is no graph either."""
        return {**self.__dict__, "arguments": None}


class StockLower(ModuleLower):
    """A module whose ``solve()`` keeps its own loop: only the upper level is stepped automatically.

    Args:
        module: An ``ImplicitMetaGradientModule``, with an objective or with an optimality function only.
    """

    def __init__(self, module: Any) -> None:
        check_module("UpperStep", module, steps=False)
        check_lower("UpperStep", list(module.parameters()))
        self.module = module
        self.tasks = []
        if not isinstance(module.__dict__.get("solve"), SeenSolve):
            module.__dict__["solve"] = SeenSolve(module)
        self._seen: SeenSolve = module.__dict__["solve"]

    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the module's parameters after solve()."""
        refuse_solution(solution)
        params = list(self.module.parameters())
        attached("UpperStep", params)
        self._seen.marks.check("UpperStep", params)
        return [params]

    def replaced(self) -> list[Any]:
        """Return the graph's nodes of solutions that later calls of solve() have replaced."""
        return self._seen.marks.replaced

    def closures(self) -> list[Callable[[], Any] | None]:
        """Return what TorchOpt differentiates, on what solve() was given; None if that was not seen."""
        seen = self._seen.arguments
        if seen is None:
            return [None]
        args, kwargs = seen
        function = self.module.optimality if type(self.module)._custom_optimality else self.module.objective
        return [lambda: function(*args, **kwargs)]

    def done(self) -> None:
        """Let go of the sample."""
        self._seen.arguments = None
