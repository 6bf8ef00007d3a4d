"""The upper step: TorchOpt's hypergradient, then the core's search or Polyak step on the meta-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.bilevel import LowerLevel
from adaptive_bilevel.errors import ClosureError, HypergradientError, LowerLevelError, OptionError
from adaptive_bilevel.evaluation.counts import Evaluations
from adaptive_bilevel.evaluation.guard import Guard, Workspace
from adaptive_bilevel.hypergradient.curvature import LowerCurvature
from adaptive_bilevel.policies import Record

from .backward import differentiate, fresh
from .functional import FunctionalLowerStep
from .refusals import refuse_replaced, refuse_shared, refuse_unregistered
from .residual import local_objective, refuse_asymmetric
from .rules import resolve
from .solvers import Ridge, SafeNeumann
from .stock import StockLower
from .task import Lower, Task

__all__ = ["UpperStep"]


class UpperStep:
    """Automatic upper steps on TorchOpt's meta-parameters.

    `step` takes the hypergradient that TorchOpt computes (a backward of the upper loss through ``solve()``), cuts the
    lower parameters from TorchOpt's graph, so that the upper loss then has its two partial gradients, and takes a step
    of `BiSLS` or `BiSPS`.

    Args:
        params: Meta-parameters, or groups of them.
        rule: `BiSLS` or `BiSPS` of adaptive_bilevel, or a policy (``policies.Constant(bound=1e-3)``: TorchOpt's step).
        lr: The first trial (BiSLS) or the bound (BiSPS). Left out, it is found.
        lower: The module's `LowerStep`; a `FunctionalLowerStep`; the module itself if its ``solve()`` keeps a loop of
            its own (the instance's ``solve`` then remembers its last call); or a list of them, one for each task of a
            meta-batch.
        direction: "sgd", "adam", or a GradientTransformation of TorchOpt with learning rate 1 (see `Transformed`).
        solver: P of the tangent response. Left out: of the kind that the module declares as its linear_solve.
        options: Options of the rule.

    Attributes:
        optimizer: The optimizer of the core, for schedulers and hooks.

    Raises:
        OptionError: An option is out of range.
        TensorError: A meta-parameter is a lower parameter too, or lower tensors are of a kind that TorchOpt
            differentiates wrongly.

    ::

        meta = UpperStep([x], lower=inner.lower, direction="adam")
        for batch, val in data:
            inner.solve(batch)
            meta.step(lambda: loss(inner, val))
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Any = BiSLS,
        lr: float | None = None,
        *,
        lower: Any,
        direction: Any = "sgd",
        solver: Any = None,
        **options: Any,
    ) -> None:
        listed = lower if isinstance(lower, (list, tuple)) else [lower]
        if sum(isinstance(given, FunctionalLowerStep) for given in listed) and len(listed) > 1:
            raise OptionError(
                f"UpperStep(lower={lower!r}): one FunctionalLowerStep serves all tasks of a meta-batch; pass it alone"
            )
        modules = [each.module if isinstance(each, Lower) else each for each in listed]
        for index, module in enumerate(modules):
            if any(module is other for other in modules[:index]):
                raise OptionError(
                    f"UpperStep(lower=...): a {type(module).__name__} is listed twice, but a module has one solution: "
                    "make a module for each task, or take a FunctionalLowerStep, whose solver may be called for each"
                )
        self._lowers = [given if isinstance(given, Lower) else StockLower(given) for given in listed]
        cls, lr, options = resolve("UpperStep", rule, lr, {**options, "direction": direction}, upper=True)
        if solver is not None:
            options["solver"] = solver
        make: Any = cls
        self.optimizer: BiSLS | BiSPS = make(params, lr, **options)
        self._given_solver = solver is not None
        self._workspace = Workspace()
        self._checked = False
        for each in self._lowers:
            if each.module is not None:
                refuse_shared(self._params(), list(each.module.parameters()))
        if isinstance(self.optimizer, BiSPS):
            for each in self._lowers:
                each.follow()

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _tasks(self) -> list[Task | None]:
        """Return the lower problems in order; None for a module that keeps its own loop."""
        return [task for each in self._lowers for task in ([None] if isinstance(each, StockLower) else each.tasks)]

    def step(
        self,
        closure: Callable[[], Any],
        *,
        lower_closure: Any = None,
        solution: Any = None,
        lower_bound: float | None = None,
    ) -> Tensor | float:
        """Take the hypergradient and one upper step, right after solve(), and return the upper loss before it.

        Args:
            closure: Returns the upper loss at the solution, without calling solve().
            lower_closure: Returns the lower objective (or optimality) that the response follows; a list of them for
                several lower problems. Left out: that of the last lower step; for a module that keeps its own loop,
                what TorchOpt differentiates, on what its solve() was given.
            solution: For functional solvers: what the solver returned; a list of that for a meta-batch.
            lower_bound: Overrides BiSPS's option for this sample.

        Raises:
            HypergradientError: There was no solve(), or upper or lower tensors were changed since; the closure called
                solve(); the upper loss depends on no meta-parameter; or the lower objective draws random numbers where
                TorchOpt's backward cannot be made to draw them again.
            LowerLevelError: A lower closure, lower step or solution is missing.
            ClosureError: A closure does not return an attached scalar, or one that was computed before.
            SolverError: The module's linear_solve returns wrong hypergradients (see `declared_solver`).
            NonFiniteError: max_skips steps in a row were not finite.
        """
        if not callable(closure):
            raise ClosureError(
                f"UpperStep.step(closure={closure!r}): pass a function, e.g. meta.step(lambda: val(inner))"
            )
        searching = isinstance(self.optimizer, BiSLS)
        solutions = [tensors for each in self._lowers for tensors in each.ready(solution)]
        given = self._lower_closures(lower_closure)
        closures = [
            local_objective(c, tensors) if task is None and c is not None else c
            for c, task, tensors in zip(given, self._tasks(), solutions, strict=True)
        ]
        loss, hypergradient, registered = self._differentiate(closure, solutions, leave_trace=not searching)
        for tensors in solutions:
            for p in tensors:
                p.detach_().requires_grad_()
        optimizers = self._bind(solutions)
        self._check_once(given, closures, optimizers, solutions, registered)
        params = self._params()
        before = [p.grad for p in params]
        try:
            for p, g in zip(params, hypergradient, strict=True):
                p.grad = g
            stepping: Any = self.optimizer
            stepping.evaluations.upper.gradients += 1
            if searching:
                with fresh():
                    returned: Tensor = stepping.step(closure, closures)
            else:
                returned = stepping.step(loss=loss, lower_bound=lower_bound)
        except BaseException:
            for p, g in zip(params, before, strict=True):
                p.grad = g
            raise
        for each in self._lowers:
            each.done()
        return returned

    def _lower_closures(self, given: Any) -> list[Any]:
        """Return one lower closure for each lower problem; None where the lower step remembers its own."""
        own = [closure for each in self._lowers for closure in each.closures()]
        listed = list(given) if isinstance(given, (list, tuple)) else [given] * len(own)
        if len(listed) != len(own):
            raise LowerLevelError(
                f"UpperStep.step: {len(listed)} lower closures for {len(own)} lower problems; pass one for each"
            )
        chosen = [mine if told is None else told for told, mine in zip(listed, own, strict=True)]
        stock = [task is None for task in self._tasks()]
        if isinstance(self.optimizer, BiSLS) and any(s and c is None for s, c in zip(stock, chosen, strict=True)):
            raise LowerLevelError(
                "UpperStep.step(lower_closure=None): the module was solved before there was an UpperStep, so what its "
                "solve() was given is not known. Solve after constructing it, or pass the objective on that sample, as "
                "in meta.step(lambda: val(inner), lower_closure=lambda: inner.objective(batch))"
            )
        return chosen

    def _differentiate(
        self, closure: Callable[[], Any], solutions: Sequence[Sequence[Tensor]], *, leave_trace: bool
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """Return the upper loss, TorchOpt's hypergradient, and at the first step the tensors that it differentiates by.

        Whether buffers and random state moved is as asked.
        """
        params = self._params()
        with Guard([p for p in params if p.requires_grad], self._workspace) as guard, ExitStack() as contexts:
            loss = guard.attached(closure)
            guard.mark()
            self._refuse_solved_inside(solutions)
            refuse_replaced(loss, [each for lower in self._lowers for each in lower.replaced()])
            for each in self._lowers:
                contexts.enter_context(each.backward())
            registered = [] if self._checked else [x for each in self._lowers for x in each.registered(solutions)]
            hypergradient = differentiate(loss, params)
            if not leave_trace:
                guard.undo()
        return loss.detach(), hypergradient, registered

    def _refuse_solved_inside(self, solutions: Sequence[Sequence[Tensor]]) -> None:
        known = {id(p) for tensors in solutions for p in tensors}
        for each in self._lowers:
            if each.module is not None and any(id(p) not in known for p in each.module.parameters()):
                raise HypergradientError(
                    "UpperStep: the closure called solve(), which every trial would do again. Call it before step()"
                )

    def _bind(self, solutions: Sequence[Sequence[Tensor]]) -> list[torch.optim.Optimizer]:
        """Bind the optimizers of both levels to the leaves that the solutions have become."""
        optimizers: list[torch.optim.Optimizer] = []
        for task, tensors in zip(self._tasks(), solutions, strict=True):
            if task is None:
                optimizers.append(torch.optim.SGD(list(tensors), lr=1.0))  # holds the tensors, and never steps
            else:
                optimizers.append(task.bind(tensors))
        level = self.optimizer.lower
        if not isinstance(level, LowerLevel) or [id(o) for o in optimizers] != [id(o) for o in level.optimizers]:
            self.optimizer.bind(optimizers)
        return optimizers

    def _check_once(
        self,
        raw_closures: Sequence[Any],
        closures: Sequence[Any],
        optimizers: Sequence[Any],
        solutions: Sequence[Sequence[Tensor]],
        registered: Sequence[Tensor],
    ) -> None:
        """At the first step: find the declared solver, and look at what TorchOpt takes for granted."""
        if self._checked:
            return
        declared = [each.solver() for each in self._lowers]
        if isinstance(self.optimizer, BiSLS) and not self._given_solver:
            if any(other != declared[0] for other in declared):
                raise OptionError(
                    f"UpperStep: the modules declare different linear solvers {declared}; pass solver= for the response"
                )
            self.optimizer.solver = declared[0]
        lower = [p for tensors in solutions for p in tensors]
        upper = self._params()
        with Guard([*upper, *lower], Workspace()) as guard:

            def total() -> Tensor:
                losses = []
                for given, optimizer in zip(closures, optimizers, strict=True):
                    known = getattr(optimizer, "sample", None)
                    if given is not None:
                        losses.append(guard.attached(given))
                    elif known is not None:
                        losses.append(guard.attached(known.closure, known.random))
                return torch.stack([loss.reshape(()) for loss in losses]).sum() if losses else torch.zeros(())

            if isinstance(self.optimizer, BiSLS):
                for task, given, tensors in zip(self._tasks(), raw_closures, solutions, strict=True):
                    if task is None:
                        refuse_asymmetric(given, tensors)
            refuse_unregistered(upper, registered, total)
            series = [s for s in declared if isinstance(s.solver if isinstance(s, Ridge) else s, SafeNeumann)]
            if series:
                with torch.enable_grad():
                    loss = total()
                    if loss.requires_grad:
                        curvature = LowerCurvature(loss, upper, lower)
                        series[0].solve(curvature.hvp, tuple(torch.ones_like(p) for p in lower))
            guard.undo()
        self._checked = True

    # ------------------------------------------------------------------------------------------ the optimizer's own

    @property
    def record(self) -> Record | None:
        """The last step's record."""
        return self.optimizer.record

    @property
    def evaluations(self) -> Evaluations:
        """Every oracle call so far, the hypergradient's forward and backward included (but not TorchOpt's solve)."""
        return self.optimizer.evaluations

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of meta-parameters, with lr and step_size."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do what optimizers do; no step needs it."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers and tensors. That of the lower steps is in their own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it."""
        self.optimizer.load_state_dict(state)
