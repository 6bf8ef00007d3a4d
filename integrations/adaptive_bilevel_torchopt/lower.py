"""The lower loop inside a module's ``solve()``. Its step sizes are kept between calls, for new parameters too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from adaptive_bilevel import AutoSLS
from adaptive_bilevel.errors import LowerLevelError, TensorError
from adaptive_bilevel.evaluation.guard import Closure
from adaptive_bilevel.evaluation.parts import require_whole
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from ._host import Module
from .backward import as_differentiated
from .direction import DirectionOption
from .lower_level import SolvedLevel
from .refusals import IN_PARTS, check_lower, check_module, solution_of
from .rules import Rule, lower_recipe, made_once
from .solvers import declared_solver
from .task import SolvedProblem, Task, scalar

__all__ = ["LowerStep"]


@final
class LowerStep(SolvedLevel):
    """Automatic lower steps for an ``ImplicitMetaGradientModule``.

    Args:
        module: The module; ``self`` in its ``__init__``.
        rule: `SLS`, `SLSB`, `AutoSLS`, `SPSB`, `SPSMax` or `DecSPS` of adaptive_bilevel, or a policy.
        lr: The bound (Polyak rules, `SLSB`), the first trial (`SLS`) or both (`AutoSLS`). If None, it is estimated.
        direction: "sgd", "adam" or a GradientTransformation of TorchOpt with learning rate 1.
        options: Options of the rule.

    Attributes:
        optimizer: The optimizer of the core; None before the first `attach`.

    Raises:
        OptionError: The module has no objective or no linear_solve, or an option is out of range.
        TensorError: A parameter of the module is in parts (`fully_shard`).

    >>> import torchopt
    >>> class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg()):
    ...     def __init__(self, x):
    ...         super().__init__()
    ...         self.x, self.y = x, torch.nn.Parameter(torch.zeros(2))
    ...         self.lower = LowerStep(self, AutoSLS)
    ...     def objective(self, target):
    ...         return ((self.y - target) ** 2 + self.x * self.y**2).sum()
    ...     def solve(self, target):
    ...         step = self.lower.attach()
    ...         for _ in range(20):
    ...             step(lambda: self.objective(target))
    >>> inner = Inner(torch.ones(2, requires_grad=True))
    >>> _ = inner.solve(torch.tensor([2.0, 4.0]))
    >>> print(inner.y.detach().round(decimals=2).tolist())
    [1.0, 2.0]
    """

    module: Module

    def __init__(
        self,
        module: Module,
        rule: Rule = AutoSLS,
        lr: float | None = None,
        *,
        direction: DirectionOption = "sgd",
        **options: object,
    ) -> None:
        check_module("LowerStep", module, steps=True)
        require_whole("LowerStep", module.parameters(), IN_PARTS)
        self.module = module
        self._task = Task(made_once(lower_recipe("LowerStep", rule, lr, direction, options)))

    @property
    def optimizer(self) -> AdaptiveOptimizer | None:
        """The optimizer of the core."""
        return self._task.optimizer

    def attach(self) -> Callable[..., Tensor]:
        """Begin a lower loop: detach the module's parameters, and return the step on them.

        Raises:
            TensorError: A parameter is frozen or has no dimension. TorchOpt differentiates both wrongly.
        """
        params = list(self.module.parameters())
        known = self._task.params()
        # After a solve() the parameters are TorchOpt's tensors: whether those are frozen is no choice of the user's.
        if not known or list(map(id, params)) == list(map(id, known)):
            check_lower("LowerStep.attach", params)
        self.cut()
        self._task.step_on(params)
        self._task.staleness.begin(list(self.module.meta_parameters()))
        return self.step

    def step(self, closure: Closure, **options: object) -> Tensor:
        """Take a lower step and return the loss before the step.

        Args:
            closure: Returns the objective on a sample.
            options: Arguments of the rule's ``step``: step_closure, lower_bound.

        Raises:
            ClosureError: The objective has a dimension. TorchOpt's backward does not support that.
        """
        task = self._task
        if task.optimizer is None:
            raise LowerLevelError("LowerStep.step: call attach() at the beginning of solve()")
        return task.step(scalar(closure), options)

    def mark(self) -> None:
        """Use the present parameters as the solution. For a solve() that changes them after its last step."""
        self._task.take_solution()

    def reset(self, params: Sequence[Tensor] | None = None) -> None:
        """Set the parameters to other values, for example for the next task.

        A new module for each task leaks memory in TorchOpt (metaopt/torchopt#113); reuse one module instead.

        Args:
            params: The values, in the order of ``parameters()``. By default those of ``meta_parameters()``, for lower
                variables that start from the upper ones (iMAML).

        Raises:
            TensorError: Shapes differ.
        """
        values = list(self.module.meta_parameters()) if params is None else list(params)
        own = list(self.module.parameters())
        if [p.shape for p in own] != [v.shape for v in values]:
            raise TensorError(
                f"LowerStep.reset: shapes {[tuple(v.shape) for v in values]} for parameters of shapes "
                f"{[tuple(p.shape) for p in own]}; pass one tensor for each"
            )
        self.cut()
        with torch.no_grad():
            for p, v in zip(own, values, strict=True):
                p.copy_(v.detach())

    def cut(self) -> None:
        """Detach the parameters from TorchOpt's graph, for example to deepcopy the module after solve()."""
        params = list(self.module.parameters())
        self._task.staleness.note(params)
        for p in params:
            p.detach_().requires_grad_()

    def solved(self, solution: object) -> list[SolvedProblem]:
        """Return the one lower problem, solved by the module's parameters."""
        params = solution_of(self.module, solution)
        self._task.check("UpperStep", params)
        return [SolvedProblem(params, self._task.staleness, self._task)]

    def backward(self) -> contextlib.AbstractContextManager[None]:
        """Run TorchOpt's backward with the random numbers of the last lower step, without changes of buffers."""
        sample = None if self.optimizer is None else self.optimizer.sample
        return as_differentiated(self.module, None if sample is None else sample.random)

    def registered(self, problems: Sequence[SolvedProblem]) -> list[Tensor]:
        """Return the module's meta-parameters."""
        return list(self.module.meta_parameters())

    def solver(self) -> LinearSolver:
        """Return the solver of the declared kind."""
        return declared_solver(type(self.module).linear_solve, list(self.module.parameters()))

    def follow(self) -> None:
        """Let the bound decay with the upper iterations."""
        self._task.clocked = True

    def done(self) -> None:
        """Do nothing: the next upper step may follow the same sample."""

    def state_dict(self) -> StateDict:
        """Return the state of the steps: numbers and tensors."""
        return self._task.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Load a state. Before the first `attach`, it is kept until then."""
        self._task.load_state_dict(state)
