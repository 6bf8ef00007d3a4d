"""The lower loop inside a function that ``custom_root`` decorates, with one task for each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, final

from torch import Tensor
from torch.optim.optimizer import StateDict

from adaptive_bilevel import AutoSLS
from adaptive_bilevel.errors import LowerLevelError, OptionError, TensorError
from adaptive_bilevel.evaluation.tensors import refuse_unsupported
from adaptive_bilevel.hypergradient import LinearSolver

from ._host import torchopt
from .direction import DirectionOption
from .hypergradient import gradients
from .lower_level import SolvedLevel
from .refusals import attached, check_lower
from .rules import Rule, lower_recipe, made_once
from .solvers import DeclaredSolve, declared_solver
from .task import SolvedProblem, Task, scalar

__all__ = ["FunctionalLowerStep"]

Params: TypeAlias = Any
"""A tensor, or a list or tuple of them: what a solver takes and returns."""


@final
class FunctionalLowerStep(SolvedLevel):
    """Automatic lower steps for solvers that are functions decorated by ``torchopt.diff.implicit.custom_root``.

    Args:
        objective: ``objective(params, *args) -> loss``. The optimality function is its gradient in `params`. The rules
            compare losses, so that the optimality function is not enough.
        rule: As in `LowerStep`.
        lr: As in `LowerStep`.
        linear_solve: The argument ``solve`` of custom_root. None is its default, ``solve_normal_cg()``.
        direction: As in `LowerStep`.
        options: Options of the rule.

    For a meta-batch of tasks, call the solver once for each task before the upper step. The k-th call continues with
    the step size of the k-th task before. For an evaluation, use another object, or call `rewind` afterwards.

    Raises:
        OptionError: As `LowerStep`.

    >>> import torch
    >>> from torchopt.diff.implicit import custom_root
    >>> from adaptive_bilevel_torchopt import UpperStep
    >>> objective = lambda y, x: ((y - x / 2) ** 2).sum()
    >>> lower = FunctionalLowerStep(objective, AutoSLS)
    >>> @custom_root(torch.func.grad(objective), argnums=1)
    ... def solve(y, x):
    ...     y, step = lower.attach(y, x)
    ...     for _ in range(10):
    ...         step()
    ...     return y
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([0.0])
    >>> meta = UpperStep([x], lower=lower)
    >>> for _ in range(10):
    ...     y = solve(y.detach(), x)
    ...     _ = meta.step(lambda: ((y - 1) ** 2).sum(), solution=y)
    >>> round(x.item(), 2)
    2.0
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        rule: Rule = AutoSLS,
        lr: float | None = None,
        *,
        linear_solve: DeclaredSolve | None = None,
        direction: DirectionOption = "sgd",
        **options: object,
    ) -> None:
        if not callable(objective):
            raise OptionError(
                f"FunctionalLowerStep(objective={objective!r}): pass objective(params, *args) -> loss, of which the "
                "optimality function is the gradient; SLS and SPS steps compare losses"
            )
        self.objective = objective
        self.linear_solve = linear_solve
        self.module = None
        self._recipe = made_once(lower_recipe("FunctionalLowerStep", rule, lr, direction, options))
        self._tasks: list[Task] = []
        self._pool: list[Task] = []
        self._clocked = False

    def attach(self, params: Params, *args: Any) -> tuple[Params, Callable[..., Tensor]]:
        """Begin a lower loop from copies of `params`, and return them and the step on them.

        Args:
            params: A tensor or a sequence of them.
            args: The other arguments of the objective.

        Raises:
            TensorError: `params` are not tensors, or of an unsupported kind, or TorchOpt differentiates them wrongly.
        """
        single = isinstance(params, Tensor)
        listed = list(params) if isinstance(params, Iterable) and not single else [params]
        if not all(isinstance(p, Tensor) for p in listed):
            raise TensorError(
                f"FunctionalLowerStep.attach(params={type(params).__name__}): pass a tensor, or a list or tuple of "
                "tensors, which TorchOpt's custom_root takes; of a dictionary tuple(params.values()), and name them "
                "in the objective again"
            )
        for p in listed:
            refuse_unsupported("FunctionalLowerStep.attach", p)
        leaves = [p.detach().clone().requires_grad_() for p in listed]
        check_lower("FunctionalLowerStep.attach", leaves)
        index = len(self._tasks)
        if index == len(self._pool):
            self._pool.append(self._task())
        task = self._pool[index]
        if [p.shape for p in task.params()] not in ([], [p.shape for p in leaves]):
            task = self._pool[index] = self._task()  # another problem: nothing is known of its step sizes
        task.step_on(leaves)
        given: list[object] = list(torchopt.pytree.tree_leaves(args))  # type: ignore[arg-type]
        task.staleness.begin([x for x in given if isinstance(x, Tensor) and x.requires_grad])
        self._tasks.append(task)
        structure: Callable[[list[Tensor]], Params] = (
            (lambda tensors: tensors[0]) if single else (tuple if isinstance(params, tuple) else list)
        )

        def loss() -> Tensor:
            return self.objective(structure(task.params()), *args)

        def step(**options: object) -> Tensor:
            return task.step(scalar(loss), options)

        return structure(leaves), step

    def _task(self) -> Task:
        task = Task(self._recipe)
        task.clocked = self._clocked
        return task

    def follow(self) -> None:
        """Let bounds decay with the upper iterations."""
        self._clocked = True

    def rewind(self) -> None:
        """Forget the loops since the last upper step, except for their step sizes."""
        self._tasks = []

    def solved(self, solution: Params | None) -> list[SolvedProblem]:
        """Return the lower problems in the order of the loops."""
        if solution is None:
            raise LowerLevelError(
                "UpperStep.step(solution=None): pass what the functional solver returned (a list of that for a "
                "meta-batch), as in meta.step(lambda: val(y), solution=y)"
            )
        listed = isinstance(solution, list) and len(solution) == 1 and not isinstance(solution[0], Tensor)
        if len(self._tasks) == 1 and not listed:
            solution = [solution]
        solutions: list[list[Tensor]] = [[s] if isinstance(s, Tensor) else list(s) for s in solution]
        if len(solutions) != len(self._tasks):
            raise LowerLevelError(
                f"UpperStep.step: {len(solutions)} solutions for {len(self._tasks)} lower loops since the last upper "
                "step: pass one for each, in their order (rewind() forgets loops of an evaluation)"
            )
        problems = []
        for task, tensors in zip(self._tasks, solutions, strict=True):
            if [p.shape for p in task.params()] != [t.shape for t in tensors]:
                raise LowerLevelError(
                    f"UpperStep.step: a solution has shapes {[tuple(t.shape) for t in tensors]} where the lower loop "
                    f"had {[tuple(p.shape) for p in task.params()]}; pass the solutions in the order of the loops"
                )
            attached("UpperStep", tensors)
            task.check("UpperStep", tensors)
            problems.append(SolvedProblem(tensors, task.staleness, task))
        return problems

    def backward(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def registered(self, problems: Sequence[SolvedProblem]) -> list[Tensor]:
        """Return those of the tensors that the loops were begun with to which TorchOpt's backward returns a gradient.

        Only TorchOpt's backward shows whether argnums names an argument: it runs once more for each task.
        """
        forgotten: set[int] = set()
        for problem in problems:
            upper = problem.staleness.upper
            if upper:
                found = gradients(problem.tensors, upper, retain_graph=True)
                forgotten.update(id(x) for x, g in zip(upper, found, strict=True) if g is None)
        return [x for problem in problems for x in problem.staleness.upper if id(x) not in forgotten]

    def solver(self) -> LinearSolver:
        """Return the solver of the declared kind."""
        params = self._tasks[0].params() if self._tasks else []
        return declared_solver(self.linear_solve, params)

    def done(self) -> None:
        """Begin the next meta-batch."""
        self.rewind()

    def state_dict(self) -> StateDict:
        """Return the state of the steps of every task: numbers and tensors."""
        return {"tasks": [task.state_dict() for task in self._pool]}

    def load_state_dict(self, state: StateDict) -> None:
        """Load a state. The state of a task without a loop is kept until its first loop."""
        while len(self._pool) < len(state["tasks"]):
            self._pool.append(self._task())
        for task, saved in zip(self._pool, state["tasks"], strict=False):
            task.load_state_dict(saved)
