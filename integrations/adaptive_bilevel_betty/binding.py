"""`bind` gives each optimizer its problem and the problems below, from the graph of the engine."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from adaptive_bilevel.bilevel import Lower
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import Lanczos, LinearSolver
from adaptive_bilevel.optim.polyak_step import PolyakOptimizer

from .bilevel import BiSLS, BiSPS, OneStepBiSLS
from .bound_problem import BoundProblem
from .evaluation_log import EvaluationLog
from .graph import edges, lookahead
from .hypergradient import register
from .lower_problems import LowerProblems
from .optimizers import SLS, SLSB, SPSB, AutoSLS, DecSPS, SPSMax
from .refusals import refuse
from .release import BettyEngine, Engine, Problem, rolls_back

__all__ = ["AdaptiveEngine", "bind"]

E = TypeVar("E", bound=BettyEngine)

_OURS = (SPSMax, DecSPS, SPSB, SLS, SLSB, AutoSLS, BiSPS, BiSLS, OneStepBiSLS)


def bind(engine: E, *, solver: LinearSolver | None = None) -> E:
    """Bind the optimizers of an engine's problems to their problems, and return the engine.

    Call it after ``Engine(...)``, which rebuilds optimizers, and again after ``problem.set_optimizer`` or
    ``engine.set_dependency``. Some problems may have stock optimizers.

    These instances change: ``problem.get_loss`` records its evaluations, and ``problem.in_trial`` is True while a loss
    is evaluated again, so that a training_step can skip its metrics. `bind` also registers the hypergradient type
    "adaptive_cg".

    Args:
        engine: A `betty.engine.Engine` whose problems are `ImplicitProblem`s.
        solver: The solver of ``Config(type="adaptive_cg")``. By default, that of the `BiSLS` above the problem, or
            Lanczos().

    Raises:
        OptionError: The configuration of a problem or of the engine is not supported (see `refusals`). Nothing is bound
            then.
        TensorError: A problem has no trainable parameters, or shares parameters with a problem below it.
        ClosureError: A problem has no training_step.

    >>> import logging, torch
    >>> from betty.configs import Config, EngineConfig
    >>> from betty.engine import Engine
    >>> from betty.problems import ImplicitProblem
    >>> from adaptive_bilevel_betty import SLS, BiSLS, bind
    >>> class Outer(ImplicitProblem):
    ...     def training_step(self, batch):
    ...         return ((self.inner.module[0] - 3.0) ** 2).sum()
    >>> class Inner(ImplicitProblem):
    ...     def training_step(self, batch):
    ...         return ((self.module[0] - self.outer.module[0]) ** 2).sum()
    >>> logging.getLogger("betty").disabled = True
    >>> x, y = torch.nn.ParameterList([torch.zeros(2)]), torch.nn.ParameterList([torch.zeros(2)])
    >>> outer = Outer("outer", Config(), x, BiSLS(x.parameters(), direction="adam"), None, [torch.zeros(1)])
    >>> lower = Config("adaptive_cg", unroll_steps=10)
    >>> inner = Inner("inner", lower, y, SLS(y.parameters()), None, [torch.zeros(1)])
    >>> links = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    >>> bind(Engine([outer, inner], EngineConfig(train_iters=200), links)).run()
    >>> print([round(entry, 1) for entry in outer.module[0].tolist()])
    [3.0, 3.0]
    """
    problems: list[Problem] = list(getattr(engine, "problems", ()))
    if not problems or not all(hasattr(problem, "get_loss") for problem in problems):
        raise OptionError(f"bind({type(engine).__name__}): pass the engine, after engine = Engine(...)")
    if not (solver is None or callable(getattr(solver, "solve", None))):
        raise OptionError(
            f"bind(solver={solver!r}): solver must be Lanczos(...), CG(...), Neumann(...) or Identity(...)"
        )
    ours = [problem for problem in problems if isinstance(problem.optimizer, _OURS)]
    refuse(engine, problems, ours)
    register()
    for problem in problems:
        before = BoundProblem.of_any(problem)
        log = EvaluationLog(problem, problems) if before is None else before.log
        log.problems = problems
        BoundProblem(log, partial(_solver_of, problem, ours, solver), rolls_back(engine)).keep()
        problem.in_trial = False
    for problem in ours:
        _connect(BoundProblem.of(problem), ours)
    return engine


def _connect(problem: BoundProblem, ours: list[Problem]) -> None:
    """Give a problem's optimizer its host and its lower level."""
    optimizer = problem.problem.optimizer
    assert isinstance(optimizer, _OURS)
    optimizer.host = problem
    if isinstance(optimizer, BiSPS):
        optimizer.bind(_clocked(problem, ours))
    elif isinstance(optimizer, (BiSLS, OneStepBiSLS)):
        lower: Lower = LowerProblems(problem)
        optimizer.bind(lower)


def _clocked(problem: BoundProblem, ours: list[Problem]) -> list[PolyakOptimizer]:
    """Return the Polyak rules below that count this one's steps: each has one clock, its first parent."""
    mine = []
    for below in lookahead(problem.problem):
        above = [p for p in ours if isinstance(p.optimizer, BiSPS) and below in edges(p)]
        if isinstance(below.optimizer, PolyakOptimizer) and above[0] is problem.problem:
            mine.append(below.optimizer)
    return mine


def _solver_of(problem: Problem, ours: list[Problem], given: LinearSolver | None) -> LinearSolver:
    """Return the solver that `bind` was given, or that of the BiSLS above as it is now, or Lanczos()."""
    if given is not None:
        return given
    for upper in ours:
        if isinstance(upper.optimizer, BiSLS) and problem in lookahead(upper):
            return upper.optimizer.solver
    return Lanczos()


class AdaptiveEngine(Engine):  # type: ignore[misc]
    """Betty's engine with `bind`: ``AdaptiveEngine(...)`` is ``bind(Engine(...))``.

    Args:
        problems: As in Betty's ``Engine``.
        config: Likewise.
        dependencies: Likewise.
        env: Likewise.

    Raises:
        OptionError: As `bind`.
    """

    def initialize(self) -> None:
        """Initialize as Betty does, then bind."""
        super().initialize()
        bind(self)
