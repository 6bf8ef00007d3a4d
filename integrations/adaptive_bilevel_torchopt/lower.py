"""The lower loop inside ``solve()``: its step sizes outlive the call, although the parameters are new ones after it.

TorchOpt's implicit solvers run the user's loop without a graph and then put new tensors, attached to the graph of the
hypergradient, in the place of the parameters. So a lower step is an optimizer of the core that is bound to the present
tensors at the beginning of each loop (`attach`), and again, cut from the graph, by the upper step.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS
from adaptive_bilevel.errors import ClosureError, HypergradientError, LowerLevelError, OptionError, TensorError
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.polyak import PolyakOptimizer

from ._host import torchopt
from .direction import as_direction
from .host_module import as_differentiated, check_lower, check_module, fingerprint, same
from .rules import resolve
from .solvers import declared_solver

__all__ = ["FunctionalLowerStep", "LowerStep", "StockLower", "Task"]

_CHANGED = (
    "{who} changed between solve() and the upper step: TorchOpt would return a wrong hypergradient without saying so. "
    "Take the upper step (which takes the hypergradient first) right after solve(), and change things after it"
)


class Task:
    """One lower problem: its parameters, the optimizer bound to them, and what must not change under a hypergradient.

    Args:
        make: Makes the optimizer for some tensors.
    """

    def __init__(self, make: Callable[[list[Tensor]], AdaptiveOptimizer]) -> None:
        self._make = make
        self._saved: dict[str, Any] | None = None
        self._marks: tuple[Tensor, Tensor] | None = None
        self.optimizer: AdaptiveOptimizer | None = None
        self.clocked = False  # by a BiSPS above, whose iterations its bound then follows
        self.upper: list[Tensor] = []

    def bind(self, params: Sequence[Tensor]) -> AdaptiveOptimizer:
        """Step on these leaves from now on, and return the optimizer."""
        if self.optimizer is None:
            self.optimizer = self._make(list(params))
            if self._saved is not None:
                self.optimizer.load_state_dict(self._saved)
                self._saved = None
            if self.clocked and isinstance(self.optimizer, PolyakOptimizer):
                self.optimizer.set_clock(max(self.optimizer.clock, 0))
        else:
            self.optimizer.rebind(params)
        return self.optimizer

    def params(self) -> list[Tensor]:
        """Return the leaves."""
        return [] if self.optimizer is None else [p for g in self.optimizer.param_groups for p in g["params"]]

    def begin(self, upper: Sequence[Tensor]) -> None:
        """Remember the upper tensors as they are when the loop begins."""
        self.upper = [x for x in upper if x.is_floating_point()]
        self._marks = None
        self._at_begin = fingerprint(self.upper)

    def mark(self) -> None:
        """Take the present parameters as the solution."""
        self._marks = self._at_begin, fingerprint(self.params())

    def check(self, who: str, solution: Sequence[Tensor]) -> None:
        """Refuse a solution that TorchOpt's backward would not be taken at.

        Raises:
            HypergradientError: Upper or lower tensors were changed since the loop.
        """
        if self._marks is None:
            raise LowerLevelError(f"{who}: no lower step was taken in solve(); call the function that attach() returns")
        if not same(self._marks[0], fingerprint(self.upper)):
            raise HypergradientError(_CHANGED.format(who="the upper parameters"))
        if not same(self._marks[1], fingerprint(solution)):
            raise HypergradientError(
                _CHANGED.format(who="the lower parameters")
                + "; if solve() itself changes them after its last step (a projection, say), end it with mark()"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        if self.optimizer is not None:
            return self.optimizer.state_dict()
        return self._saved or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it, now or when the optimizer is made."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)
        else:
            self._saved = state or None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying keeps: not the marks, since there is no graph either."""
        return {**self.__dict__, "_marks": None, "upper": []}


class _Rule:
    """Makes a core optimizer for some tensors."""

    def __init__(self, owner: str, rule: Any, lr: float | None, direction: Any, options: dict[str, Any]) -> None:
        self.cls, self.lr, self.options = resolve(owner, rule, lr, options, upper=False)
        self.options["direction"] = as_direction(direction)
        self([torch.zeros(1, requires_grad=True)])  # wrong options are told here, not inside solve()

    def __call__(self, params: list[Tensor]) -> AdaptiveOptimizer:
        make: Any = self.cls
        made: AdaptiveOptimizer = make(params, self.lr, **self.options)
        return made


class _Lower(abc.ABC):
    """What an upper step asks of a lower one."""

    tasks: list[Task]
    module: Any = None

    @abc.abstractmethod
    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the solution's tensors of each task, attached to TorchOpt's graph, after all checks."""

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for TorchOpt's backward."""
        return contextlib.nullcontext()

    def registered(self) -> list[Tensor]:
        """Return the upper tensors that TorchOpt differentiates by."""
        return [x for task in self.tasks for x in task.upper]

    @abc.abstractmethod
    def solver(self) -> Any:
        """Return the solver of the declared kind."""

    def done(self) -> None:  # noqa: B027  (nothing to do is the rule)
        """Be told that an upper step was taken."""

    def follow(self) -> None:
        """Let bounds decay with the upper iterations, and be constant within one: beta_b,k of eq. (11)."""
        for task in self.tasks:
            task.clocked = True


class LowerStep(_Lower):
    """Automatic lower steps for an ``ImplicitMetaGradientModule``.

    Args:
        module: The module; in its ``__init__``: self.
        rule: `SLS`, `SLSB`, `SPSB`, `SPSMax` or `DecSPS` of adaptive_bilevel, or a policy.
        lr: The bound (Polyak rules, SLSB) or the first trial (SLS). Left out, it is found.
        direction: "sgd", "adam" or a GradientTransformation of TorchOpt with learning rate 1.
        options: Options of the rule.

    Attributes:
        optimizer: The optimizer of the core; None before the first `attach`.

    Raises:
        OptionError: The module has no objective, or has lost its linear_solve; or an option is out of range.

    ::

        def __init__(self, x):
            ...
            self.lower = LowerStep(self, SLS)

        def solve(self, batch):
            step = self.lower.attach()
            for _ in range(T):
                step(lambda: self.objective(batch))
    """

    def __init__(
        self, module: Any, rule: Any = SLS, lr: float | None = None, *, direction: Any = "sgd", **options: Any
    ) -> None:
        check_module("LowerStep", module, steps=True)
        self.module = module
        self.tasks = [Task(_Rule("LowerStep", rule, lr, direction, options))]

    @property
    def optimizer(self) -> AdaptiveOptimizer | None:
        """The optimizer of the core."""
        return self.tasks[0].optimizer

    def attach(self) -> Callable[..., Tensor]:
        """Begin a lower loop: cut the module's parameters from any graph, and return the step on them.

        Raises:
            TensorError: A parameter is frozen or has no dimension, both of which TorchOpt differentiates wrongly.
        """
        params = list(self.module.parameters())
        if self.optimizer is None:
            check_lower("LowerStep.attach", params)
        for p in params:
            p.detach_().requires_grad_()
        self.tasks[0].bind(params)
        self.tasks[0].begin(list(self.module.meta_parameters()))
        return self.step

    def step(self, closure: Callable[[], Tensor], **options: Any) -> Tensor:
        """Take a lower step and return the loss before it.

        Args:
            closure: Returns the objective on a sample.
            options: What the rule's own step takes: step_closure, lower_bound.

        Raises:
            ClosureError: The objective has a dimension, which TorchOpt's backward refuses.
        """
        task = self.tasks[0]
        if task.optimizer is None:
            raise LowerLevelError("LowerStep.step: call attach() at the beginning of solve()")
        stepping: Any = task.optimizer
        loss: Tensor = stepping.step(_scalar(closure), **options)
        task.mark()
        return loss

    def mark(self) -> None:
        """Take the present parameters as the solution, where solve() changes them after its last step."""
        self.tasks[0].mark()

    def reset(self, params: Sequence[Tensor] | None = None) -> None:
        """Put other values into the parameters, e.g. for the next task.

        Reuse one module this way; one that is made anew for each task leaks memory in TorchOpt (metaopt/torchopt#113).

        Args:
            params: The values, in the order of ``parameters()``; None: those of ``meta_parameters()``, for lower
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
        with torch.no_grad():
            for p, v in zip(own, values, strict=True):
                p.detach_().copy_(v.detach())
                p.requires_grad_()

    def cut(self) -> None:
        """Cut the parameters from TorchOpt's graph, e.g. to deepcopy the module after solve()."""
        for p in self.module.parameters():
            p.detach_().requires_grad_()

    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the module's parameters after solve()."""
        params = list(self.module.parameters())
        _attached("UpperStep", params)
        self.tasks[0].check("UpperStep", params)
        return [params]

    def registered(self) -> list[Tensor]:
        """Return the module's meta-parameters."""
        return list(self.module.meta_parameters())

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Let TorchOpt's backward see the last lower step's random numbers."""
        optimizer = self.optimizer
        random = None if optimizer is None or optimizer.sample is None else optimizer.sample.random
        return as_differentiated(self.module, random)

    def solver(self) -> Any:
        """Return the solver of the declared kind."""
        return declared_solver(type(self.module).linear_solve, list(self.module.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the steps: numbers and tensors."""
        return self.tasks[0].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it; before the first `attach`, it is kept until then."""
        self.tasks[0].load_state_dict(state)


class FunctionalLowerStep(_Lower):
    """Automatic lower steps for solvers that are functions decorated by ``torchopt.diff.implicit.custom_root``.

    Args:
        objective: ``objective(params, *args) -> loss``; the optimality function is its gradient in `params`. SLS and
            SPS steps compare losses, so the optimality function is not enough.
        rule: As in `LowerStep`.
        lr: As in `LowerStep`.
        linear_solve: What custom_root was given as ``solve``; None is its default, ``solve_normal_cg()``.
        direction: As in `LowerStep`.
        options: Options of the rule.

    A meta-batch of tasks is as many calls of the solver before one upper step; the k-th of them goes on with the step
    size of the k-th task before. For an evaluation take another object, or `rewind` after it.

    ::

        lower = FunctionalLowerStep(objective, SLS)

        @custom_root(torch.func.grad(objective), argnums=1)
        def solve(params, x, batch):
            params, step = lower.attach(params, x, batch)
            for _ in range(T):
                step()
            return params

        meta = UpperStep([x], lower=lower)
        y = solve(y, x, batch)
        meta.step(lambda: val(y), solution=y)
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        rule: Any = SLS,
        lr: float | None = None,
        *,
        linear_solve: Any = None,
        direction: Any = "sgd",
        **options: Any,
    ) -> None:
        if not callable(objective):
            raise OptionError(
                f"FunctionalLowerStep(objective={objective!r}): pass objective(params, *args) -> loss, of which the "
                "optimality function is the gradient; SLS and SPS steps compare losses"
            )
        self.objective = objective
        self.linear_solve = linear_solve
        self._rule = _Rule("FunctionalLowerStep", rule, lr, direction, options)
        self.tasks = []
        self._pool: list[Task] = []
        self._clocked = False

    def attach(self, params: Any, *args: Any) -> tuple[Any, Callable[..., Tensor]]:
        """Begin a lower loop from copies of `params`, and return them and the step on them.

        Args:
            params: A tensor or a sequence of them.
            args: What the objective takes beside them.
        """
        single = isinstance(params, Tensor)
        listed = [params] if single else list(params)
        leaves = [p.detach().clone().requires_grad_() for p in listed]
        check_lower("FunctionalLowerStep.attach", leaves)
        index = len(self.tasks)
        if index == len(self._pool):
            self._pool.append(self._task())
        task = self._pool[index]
        if [p.shape for p in task.params()] not in ([], [p.shape for p in leaves]):
            task = self._pool[index] = self._task()  # another problem: nothing is known of its step sizes
        task.bind(leaves)
        given: Any = torchopt.pytree.tree_leaves(args)  # type: ignore[arg-type]
        task.begin([x for x in given if isinstance(x, Tensor) and x.requires_grad])
        self.tasks.append(task)
        structure = (lambda tensors: tensors[0]) if single else (tuple if isinstance(params, tuple) else list)

        def loss() -> Tensor:
            return self.objective(structure(task.params()), *args)

        def step(**options: Any) -> Tensor:
            stepping: Any = task.optimizer
            value: Tensor = stepping.step(_scalar(loss), **options)
            task.mark()
            return value

        return structure(leaves), step

    def _task(self) -> Task:
        task = Task(self._rule)
        task.clocked = self._clocked
        return task

    def follow(self) -> None:
        """Let bounds decay with the upper iterations."""
        self._clocked = True

    def rewind(self) -> None:
        """Forget the loops since the last upper step (but not what they taught of step sizes)."""
        self.tasks = []

    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the tensors of the solutions, in the order of the loops."""
        if solution is None:
            raise LowerLevelError(
                "UpperStep.step(solution=None): pass what the functional solver returned (a list of that for a "
                "meta-batch), as in meta.step(lambda: val(y), solution=y)"
            )
        if len(self.tasks) == 1 and not (isinstance(solution, list) and len(solution) == 1 and _nested(solution)):
            solution = [solution]
        solutions = [[s] if isinstance(s, Tensor) else list(s) for s in solution]
        if len(solutions) != len(self.tasks):
            raise LowerLevelError(
                f"UpperStep.step: {len(solutions)} solutions for {len(self.tasks)} lower loops since the last upper "
                "step: pass one for each, in their order (rewind() forgets loops of an evaluation)"
            )
        for task, tensors in zip(self.tasks, solutions, strict=True):
            if [p.shape for p in task.params()] != [t.shape for t in tensors]:
                raise LowerLevelError(
                    f"UpperStep.step: a solution has shapes {[tuple(t.shape) for t in tensors]} where the lower loop "
                    f"had {[tuple(p.shape) for p in task.params()]}; pass the solutions in the order of the loops"
                )
            _attached("UpperStep", tensors)
            task.check("UpperStep", tensors)
        return list(solutions)

    def solver(self) -> Any:
        """Return the solver of the declared kind."""
        params = self.tasks[0].params() if self.tasks else []
        return declared_solver(self.linear_solve, params)

    def done(self) -> None:
        """Begin the next meta-batch."""
        self.rewind()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the steps of every task: numbers and tensors."""
        return {"tasks": [task.state_dict() for task in self._pool]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it; for tasks that were not met yet, it is kept until then."""
        while len(self._pool) < len(state["tasks"]):
            self._pool.append(self._task())
        for task, saved in zip(self._pool, state["tasks"], strict=False):
            task.load_state_dict(saved)


class StockLower(_Lower):
    """A module whose ``solve()`` keeps its own loop: only the upper level is stepped automatically.

    Args:
        module: An ``ImplicitMetaGradientModule``, with an objective or with an optimality function only.
    """

    def __init__(self, module: Any) -> None:
        check_module("UpperStep", module, steps=False)
        check_lower("UpperStep", list(module.parameters()))
        self.module = module
        self.tasks = []

    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the module's parameters after solve()."""
        params = list(self.module.parameters())
        _attached("UpperStep", params)
        return [params]

    def registered(self) -> list[Tensor]:
        """Return the module's meta-parameters."""
        return list(self.module.meta_parameters())

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Let TorchOpt's backward leave BatchNorm's statistics alone."""
        return as_differentiated(self.module, None)

    def solver(self) -> Any:
        """Return the solver of the declared kind."""
        return declared_solver(type(self.module).linear_solve, list(self.module.parameters()))


def _nested(solution: Any) -> bool:
    return not isinstance(solution[0], Tensor)


def _attached(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse parameters that are not the outcome of a differentiable solve()."""
    if any(p.grad_fn is None for p in params):
        raise HypergradientError(
            f"{owner}: the lower parameters do not come from a solve() since the last upper step, so TorchOpt has no "
            "graph for the hypergradient. Call solve() with gradients enabled right before step()"
        )


def _scalar(closure: Any) -> Callable[[], Any]:
    if not callable(closure):
        raise ClosureError(f"step(closure={closure!r}): pass a function, e.g. step(lambda: self.objective(batch))")

    def checked() -> Any:
        loss = closure()
        if isinstance(loss, Tensor) and loss.dim() > 0:
            raise ClosureError(
                f"the objective has shape {tuple(loss.shape)}; TorchOpt differentiates scalars without a dimension "
                "only, so return e.g. loss.mean() or loss.reshape(())"
            )
        return loss

    return checked
