"""A problem of a bound engine: the host of its optimizer, and the source of hypergradients through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from adaptive_bilevel.bilevel import UpperPolyak
from adaptive_bilevel.bilevel.searching import SearchingOptimizer
from adaptive_bilevel.errors import LowerLevelError
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.optim.line_search import LineSearch
from adaptive_bilevel.optim.polyak import Polyak

from .evaluation_log import EvaluationLog, LowerObjective, UpperObjective
from .graph import lookahead
from .param_callback import ParamCallback
from .release import Problem

__all__ = ["BoundProblem"]

_ATTRIBUTE = "_adaptive_bilevel"


@final
class BoundProblem:
    """A problem, its evaluations, and the step of its optimizer on them.

    Args:
        log: The problem's evaluations.
        solver: Returns P of the hypergradient type "adaptive_cg" for this problem.
        rolled_back: Whether the engine takes back what a lower problem does, so that nothing can be carried.

    Attributes:
        callback: The problem's param_callback.
        solution: The last solution of "adaptive_cg", where the next one starts.
        constraint: How a constraint of the problem's parameters is given, for messages.
    """

    constraint = "give the problem a param_callback that does it"

    def __init__(self, log: EvaluationLog, solver: Callable[[], LinearSolver], rolled_back: bool) -> None:
        self.log = log
        self.problem: Problem = log.problem
        self.callback = ParamCallback(log)
        self.rolled_back = rolled_back
        self.solution: Sequence[Tensor] | None = None
        self._solver = solver

    @staticmethod
    def of(problem: Problem) -> BoundProblem:
        """Return what `bind` has made of a problem.

        Raises:
            LowerLevelError: It is not bound.
        """
        found = BoundProblem.of_any(problem)
        if found is None:
            raise LowerLevelError(
                f"problem {problem.name!r} is not bound: add  bind(engine)  after engine = Engine(...), with this "
                "problem among the engine's problems"
            )
        return found

    @staticmethod
    def of_any(problem: Problem) -> BoundProblem | None:
        """Return what `bind` has made of a problem; None before it."""
        found = getattr(problem, _ATTRIBUTE, None)
        assert found is None or isinstance(found, BoundProblem)
        return found

    def keep(self) -> None:
        """Have `of` find it."""
        setattr(self.problem, _ATTRIBUTE, self)

    @property
    def solver(self) -> LinearSolver:
        """P of the hypergradient type "adaptive_cg" for this problem, as it is now."""
        return self._solver()

    def below(self) -> list[BoundProblem]:
        """Return the problems looked ahead into, lowest first."""
        return [BoundProblem.of(problem) for problem in lookahead(self.problem)]

    def step(self, optimizer: SearchingOptimizer | UpperPolyak | LineSearch | Polyak) -> Tensor | float:
        """Take a step of the problem's optimizer on what Betty has just evaluated, and return the loss before it.

        The loss is evaluated again for trials only, and where an upper step needs its partial gradients.
        """
        before = self.log.snapshot()
        if self.rolled_back:
            optimizer.displaced()
        try:
            if isinstance(optimizer, UpperPolyak):
                loss = optimizer.advance(loss=self.log.loss)
            elif isinstance(optimizer, SearchingOptimizer):
                loss = optimizer.advance(self._upper_objective)
            else:
                loss = optimizer.advance(self._lower_objective)
        finally:
            before.restore()
        record, report = optimizer.record, self.log.evaluations[-1].report
        assert record is not None
        for name in ("step_size", "trials", "outcome"):
            report.setdefault(name, getattr(record, name))  # the user's own metrics of the same names win
        return loss

    @functools.cached_property
    def _upper_objective(self) -> UpperObjective:
        """Made at the first step, when it is known where the parameters are: a param_callback is tried there."""
        return UpperObjective(self.log, self._projection())

    @functools.cached_property
    def _lower_objective(self) -> LowerObjective:
        return LowerObjective(self.log, self._projection(), self.callback.projected)

    def _projection(self) -> Callable[[Sequence[Tensor]], None] | None:
        return self.callback.project if self.callback.projects else None
