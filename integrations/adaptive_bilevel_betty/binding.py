"""`bind`: from the engine's graph, every optimizer learns its problem and the problems below."""

from __future__ import annotations

from functools import partial
from typing import Any

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG, LinearSolver

from ._host import Engine, Problem, rolls_back
from .bilevel import BiSLS
from .hypergradient import register
from .optimizers import Hosted
from .refusals import refuse
from .replay import Replay
from .seat import Seat, lookahead, seat_if_any, take_seat

__all__ = ["AdaptiveEngine", "bind"]


def bind(engine: Any, *, solver: LinearSolver | None = None) -> Any:
    """Bind the optimizers of an engine's problems to their problems, and return the engine.

    To be called after ``Engine(...)``, which builds optimizers anew, and again after ``problem.set_optimizer`` or
    ``engine.set_dependency``. Problems with stock optimizers may be among the others.

    What changes, on these instances only: ``problem.get_loss`` remembers what it evaluates, and ``problem.in_trial`` is
    True while a loss is evaluated again, so that a training_step can leave its metrics alone then. And Betty learns the
    hypergradient type "adaptive_cg".

    Args:
        engine: A `betty.engine.Engine` whose problems are `ImplicitProblem`s.
        solver: The solver of ``Config(type="adaptive_cg")``. Left out: that of the `BiSLS` that looks ahead into the
            problem, or CG().

    Raises:
        OptionError: A problem, or the engine, is configured in a way that no step size can be found for (see
            `refusals`). As after any error, nothing is bound.
        TensorError: A problem has nothing to step, or shares parameters with one that it looks ahead into.
        ClosureError: A problem has no training_step.
    """
    problems = list(getattr(engine, "problems", ()))
    if not problems or not all(hasattr(problem, "get_loss") for problem in problems):
        raise OptionError(f"bind({type(engine).__name__}): pass the engine, after engine = Engine(...)")
    if not (solver is None or callable(getattr(solver, "solve", None))):
        raise OptionError(f"bind(solver={solver!r}): solver must be CG(...), Neumann(...) or Identity(...)")
    ours = [problem for problem in problems if isinstance(problem.optimizer, Hosted)]
    refuse(engine, problems, ours)
    register()
    for problem in problems:
        seat = seat_if_any(problem)
        replay = Replay(problem, problems) if seat is None else seat.replay
        replay.problems = problems
        take_seat(Seat(replay, partial(_solver_of, problem, ours, solver), rolls_back(engine)))
        problem.in_trial = False
    for problem in ours:
        seat = seat_if_any(problem)
        assert seat is not None
        problem.optimizer.sit(seat)
    return engine


def _solver_of(problem: Problem, ours: list[Problem], given: LinearSolver | None) -> LinearSolver:
    """Return the solver that `bind` was given, or that of the BiSLS above as it is now, or CG()."""
    if given is not None:
        return given
    for upper in ours:
        if isinstance(upper.optimizer, BiSLS) and problem in lookahead(upper):
            return upper.optimizer.solver
    return CG()


class AdaptiveEngine(Engine):  # type: ignore[misc]
    """Betty's engine, binding by itself: ``AdaptiveEngine(...)`` is ``bind(Engine(...))``."""

    def initialize(self) -> None:
        """Initialize as Betty does, then bind."""
        super().initialize()
        bind(self)
