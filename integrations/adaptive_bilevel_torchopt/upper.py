"""The upper step: TorchOpt's hypergradient, then the core's search or Polyak step on the meta-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.bilevel import LowerLevel
from adaptive_bilevel.bilevel.searching import SearchingOptimizer
from adaptive_bilevel.errors import ClosureError, HypergradientError, LowerLevelError, OptionError
from adaptive_bilevel.evaluation import processes
from adaptive_bilevel.evaluation.counts import Evaluations
from adaptive_bilevel.evaluation.guard import Closure, Guard, Workspace
from adaptive_bilevel.evaluation.opened import closing
from adaptive_bilevel.evaluation.parts import require_whole
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.policies import Outcome, Record

from ._host import Module
from .direction import DirectionOption
from .external_loop import ExternalLoop
from .first_step import agreed_solver, look
from .functional import FunctionalLowerStep
from .hypergradient import explained
from .lower_level import SolvedLevel
from .refusals import IN_PARTS, ONE_PROCESS, refuse_shared
from .rules import Rule, upper_recipe
from .task import SolvedProblem
from .upper_loss import Differentiated, differentiate

__all__ = ["UpperStep"]

LowerOption: TypeAlias = "SolvedLevel | Module | Sequence[SolvedLevel | Module]"
"""The lower level: a lower step, a module that keeps its own loop, or a list of them."""

LowerClosures: TypeAlias = "Closure | Sequence[Closure | None] | None"
"""A lower closure, or one for each lower problem."""


class UpperStep:
    """Automatic upper steps on TorchOpt's meta-parameters.

    `step` computes TorchOpt's hypergradient (a backward of the upper loss through ``solve()``), which includes the
    partial gradients of the upper loss. It then detaches the lower parameters from TorchOpt's graph, and takes a step
    of `BiSLS`, `OneStepBiSLS` or `BiSPS`.

    Args:
        params: Meta-parameters, or groups of them.
        rule: `BiSLS`, `OneStepBiSLS` or `BiSPS` of adaptive_bilevel, or a policy (``policies.Constant(bound=1e-3)`` is
            TorchOpt's step).
        lr: The first trial (`BiSLS`) or the bound (`BiSPS`). If None, it is estimated.
        lower: The module's `LowerStep`; a `FunctionalLowerStep`; the module, if its ``solve()`` has its own loop (the
            instance's ``solve`` then stores its last call); or a list of them, one for each task of a meta-batch.
        direction: "sgd", "adam", or a GradientTransformation of TorchOpt with learning rate 1 (see `Transformed`).
        solver: P of the tangent response. By default, the kind of the module's linear_solve.
        options: Options of the rule.

    Attributes:
        optimizer: The optimizer of the core, for schedulers and hooks.

    Raises:
        OptionError: An option is out of range.
        TensorError: A meta-parameter is also a lower parameter, or in parts (`fully_shard`), or TorchOpt differentiates
            a lower tensor of this kind wrongly.

    >>> import torchopt
    >>> from adaptive_bilevel_torchopt import LowerStep
    >>> class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg()):
    ...     def __init__(self, x):
    ...         super().__init__()
    ...         self.x, self.y = x, torch.nn.Parameter(torch.zeros(2))
    ...         self.lower = LowerStep(self)
    ...     def objective(self):
    ...         return ((self.y - self.x) ** 2).sum()
    ...     def solve(self):
    ...         step = self.lower.attach()
    ...         for _ in range(20):
    ...             step(self.objective)
    >>> x = torch.zeros(2, requires_grad=True)
    >>> inner = Inner(x)
    >>> meta = UpperStep([x], lower=inner.lower, direction="adam")
    >>> for _ in range(20):
    ...     _ = inner.solve()
    ...     _ = meta.step(lambda: ((inner.y - 3.0) ** 2).sum())
    >>> print([round(entry, 1) for entry in x.tolist()])
    [3.0, 3.0]
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule = BiSLS,
        lr: float | None = None,
        *,
        lower: LowerOption,
        direction: DirectionOption = "sgd",
        solver: LinearSolver | None = None,
        **options: object,
    ) -> None:
        self._levels = _levels(lower)
        if solver is not None:
            options["solver"] = solver
        self.optimizer = upper_recipe("UpperStep", rule, lr, direction, options).make(params)
        require_whole("UpperStep", self._params(), IN_PARTS)
        self._given_solver = solver is not None
        self._workspace = Workspace()
        self._checked = False
        for level in self._levels:
            if level.module is not None:
                refuse_shared(self._params(), list(level.module.parameters()))
            if isinstance(self.optimizer, BiSPS):
                level.follow()

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @closing
    def step(
        self,
        closure: Closure,
        *,
        lower_closure: LowerClosures = None,
        solution: Any = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Compute the hypergradient, take one upper step, and return the upper loss before the step.

        Call it right after solve().

        Args:
            closure: Returns the upper loss at the solution, without calling solve().
            lower_closure: Returns the lower objective (or optimality) for the response; a list for several lower
                problems. By default, that of the last lower step. For a module with its own loop, the function that
                TorchOpt differentiates, at the arguments of solve().
            solution: For functional solvers, the result of the solver; a list for a meta-batch.
            lower_bound: Overrides the option `lower_bound` of `BiSPS` for this sample.

        Raises:
            HypergradientError: Several processes step together; there was no solve(), or upper or lower tensors were
                changed since; the closure called solve(); the upper loss depends on no meta-parameter; or the lower
                objective draws random numbers where TorchOpt's backward cannot be made to draw them again.
            LowerLevelError: A lower closure, lower step or solution is missing.
            ClosureError: A closure does not return a scalar that requires a gradient, or returns one that was computed
                before.
            SolverError: The module's linear_solve returns wrong hypergradients (see `declared_solver`).
            NonFiniteError: The loss or a gradient was not finite in max_skips steps in a row.
        """
        if not callable(closure):
            raise ClosureError(
                f"UpperStep.step(closure={closure!r}): pass a function, e.g. meta.step(lambda: val(inner))"
            )
        levels = [(level, level.solved(solution)) for level in self._levels]
        problems = [problem for _, each in levels for problem in each]
        searching, params = isinstance(self.optimizer, SearchingOptimizer), self._params()
        _set_closures(problems, lower_closure, needed=searching)
        self._workspace.group = self.optimizer.process_group
        with Guard([p for p in params if p.requires_grad], self._workspace) as guard:
            if processes.count() > 1:
                raise HypergradientError(f"UpperStep: {ONE_PROCESS.format(count=processes.count())}")
            found = differentiate(
                guard, closure, params, levels, self.evaluations, searching=searching, first=not self._checked
            )
            if searching:
                guard.rewind()  # the trials are to see what the evaluation saw; what it left comes back at the end
            self._connect([problem.cut() for problem in problems])
            if not self._checked:
                self._look(found, problems)
            loss = self._stepped(params, found, problems, lower_bound)
            outcome = self.record.outcome if searching and self.record is not None else None
            if outcome == Outcome.non_finite:
                guard.undo()
            elif outcome in (Outcome.undone, Outcome.returned):
                guard.withdraw()  # the optimizer has put the parameters to an earlier point
        for level in self._levels:
            level.done()
        return loss

    def _connect(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Bind the upper optimizer to the optimizers of the solutions, where they are not those of the last step."""
        level = self.optimizer.lower
        if not isinstance(level, LowerLevel) or [id(o) for o in optimizers] != [id(o) for o in level.optimizers]:
            self.optimizer.rebind(optimizers)

    def _look(self, found: Differentiated, problems: Sequence[SolvedProblem]) -> None:
        """At the first step: take the declared solver, and look at what TorchOpt takes for granted."""
        declared = [level.solver() for level in self._levels]
        if isinstance(self.optimizer, BiSLS) and not self._given_solver:
            self.optimizer.solver = agreed_solver(declared)
        searching = isinstance(self.optimizer, SearchingOptimizer)
        look(self._params(), found.registered, problems, declared, searching=searching)
        self._checked = True

    def _stepped(
        self,
        params: Sequence[Tensor],
        found: Differentiated,
        problems: Sequence[SolvedProblem],
        lower_bound: float | None,
    ) -> Tensor | float:
        """Take the step along the hypergradient, which .grad holds from then on, and return the loss before it."""
        before = [p.grad for p in params]
        try:
            for p, g in zip(params, found.hypergradient, strict=True):
                p.grad = g
            self.evaluations.upper.gradients += 1
            step = cast("Callable[..., Tensor | float]", self.optimizer.step)
            if found.objective is None:
                return step(loss=found.loss, lower_bound=lower_bound)
            return step(found.objective, [problem.objective for problem in problems])
        except BaseException as error:
            for p, g in zip(params, before, strict=True):
                p.grad = g
            if isinstance(error, RuntimeError) and (gone := explained(error)) is not None:
                raise gone from error
            raise

    # ------------------------------------------------------------------------------------------ the optimizer's own

    @property
    def record(self) -> Record | None:
        """The last step's record."""
        return self.optimizer.record

    @property
    def evaluations(self) -> Evaluations:
        """All oracle calls so far, including forward and backward of the hypergradient, without TorchOpt's solve."""
        return self.optimizer.evaluations

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of meta-parameters, with lr and step_size."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set gradients to zero, as `torch.optim` does. No step needs it."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> StateDict:
        """Return the state, numbers and tensors. The lower steps have their own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Load it."""
        self.optimizer.load_state_dict(state)


def _levels(lower: LowerOption) -> list[SolvedLevel]:
    """Return the lower levels that the option names."""
    listed = lower if isinstance(lower, Sequence) else [lower]
    if any(isinstance(given, FunctionalLowerStep) for given in listed) and len(listed) > 1:
        raise OptionError(
            f"UpperStep(lower={lower!r}): one FunctionalLowerStep serves all tasks of a meta-batch; pass it alone"
        )
    modules = [each.module if isinstance(each, SolvedLevel) else each for each in listed]
    for index, module in enumerate(modules):
        if any(module is other for other in modules[:index]):
            raise OptionError(
                f"UpperStep(lower=...): a {type(module).__name__} is listed twice, but a module has one solution: "
                "make a module for each task, or take a FunctionalLowerStep, whose solver may be called for each"
            )
    return [given if isinstance(given, SolvedLevel) else ExternalLoop(given) for given in listed]


def _set_closures(problems: Sequence[SolvedProblem], given: LowerClosures, *, needed: bool) -> None:
    """Put the lower closures that a step was given into its problems; where there is none, they keep their own.

    Raises:
        LowerLevelError: They are not as many, or a module's solve() was not seen and the closure is needed.
    """
    listed = list(given) if isinstance(given, Sequence) else [given] * len(problems)
    if len(listed) != len(problems):
        raise LowerLevelError(
            f"UpperStep.step: {len(listed)} lower closures for {len(problems)} lower problems; pass one for each"
        )
    for problem, closure in zip(problems, listed, strict=True):
        if closure is not None:
            problem.closure = closure
        if needed and problem.task is None and problem.closure is None:
            raise LowerLevelError(
                "UpperStep.step(lower_closure=None): the module was solved before there was an UpperStep, so what its "
                "solve() was given is not known. Solve after constructing it, or pass the objective on that sample, as "
                "in meta.step(lambda: val(inner), lower_closure=lambda: inner.objective(batch))"
            )
