"""One lower problem, and what an upper step asks of the lower level.

TorchOpt's implicit solvers run the user's loop without a graph and then put new tensors, attached to the graph of the
hypergradient, in the place of the parameters. So a lower step is an optimizer of the core that is bound to the present
tensors at the beginning of each loop, and again, cut from the graph, by the upper step.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError, LowerLevelError
from adaptive_bilevel.evaluation.guard import RandomState
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.polyak_step import PolyakOptimizer

from .backward import as_differentiated
from .marks import Marks
from .rules import resolve
from .solvers import declared_solver

__all__ = ["Lower", "ModuleLower", "Rule", "Task", "scalar"]

_MARK = "; if solve() itself changes them after its last step (a projection, say), end it with mark()"


class Task:
    """One lower problem: its parameters, the optimizer bound to them, and what must not change under a hypergradient.

    Args:
        make: Makes the optimizer for some tensors.
    """

    def __init__(self, make: Callable[[list[Tensor]], AdaptiveOptimizer]) -> None:
        self._make = make
        self._saved: dict[str, Any] | None = None
        self.marks = Marks()
        self.optimizer: AdaptiveOptimizer | None = None
        self.clocked = False  # by a BiSPS above, whose iterations its bound then follows

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
            self.optimizer.replace_parameters(params)
        return self.optimizer

    def params(self) -> list[Tensor]:
        """Return the leaves."""
        return [] if self.optimizer is None else [p for g in self.optimizer.param_groups for p in g["params"]]

    @property
    def upper(self) -> list[Tensor]:
        """The upper tensors that the loop was begun with."""
        return self.marks.upper

    def begin(self, upper: Sequence[Tensor]) -> None:
        """Remember the upper tensors as they are when the loop begins."""
        self.marks.begin(upper)

    def mark(self) -> None:
        """Take the present parameters as the solution."""
        self.marks.mark(self.params())

    def check(self, who: str, solution: Sequence[Tensor]) -> None:
        """Refuse a solution that TorchOpt's backward would not be taken at.

        Raises:
            LowerLevelError: There was no step.
            HypergradientError: Upper or lower tensors were changed since the loop.
        """
        if not self.marks.known:
            raise LowerLevelError(f"{who}: no lower step was taken in solve(); call the function that attach() returns")
        self.marks.check(who, solution, _MARK)

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


class Rule:
    """Makes a core optimizer for some tensors."""

    def __init__(self, owner: str, rule: Any, lr: float | None, direction: Any, options: dict[str, Any]) -> None:
        self.cls, self.lr, self.options = resolve(owner, rule, lr, {**options, "direction": direction}, upper=False)
        self([torch.zeros(1, requires_grad=True)])  # wrong options are told here, not inside solve()

    def __call__(self, params: list[Tensor]) -> AdaptiveOptimizer:
        """Make it."""
        make: Any = self.cls
        made: AdaptiveOptimizer = make(params, self.lr, **self.options)
        return made


class Lower(abc.ABC):
    """What an upper step asks of a lower one."""

    tasks: list[Task]
    module: Any = None

    @abc.abstractmethod
    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the solution's tensors of each task, attached to TorchOpt's graph, after all checks."""

    def closures(self) -> list[Callable[[], Any] | None]:
        """Return the lower closure of each task; None where its optimizer remembers it."""
        return [None] * len(self.tasks)

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for TorchOpt's backward."""
        return contextlib.nullcontext()

    def replaced(self) -> list[Any]:
        """Return the graph's nodes of solutions that later loops have replaced: no upper loss may depend on them."""
        return [each for task in self.tasks for each in task.marks.replaced]

    @abc.abstractmethod
    def registered(self, solutions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the upper tensors that TorchOpt differentiates by.

        Args:
            solutions: The tensors of each lower problem of the upper step, with their graph.
        """

    @abc.abstractmethod
    def solver(self) -> Any:
        """Return the solver of the declared kind."""

    def done(self) -> None:  # noqa: B027  (nothing to do is the rule)
        """Be told that an upper step was taken."""

    def follow(self) -> None:
        """Let bounds decay with the upper iterations, and be constant within one: beta_b,k of eq. (11)."""
        for task in self.tasks:
            task.clocked = True


class ModuleLower(Lower):
    """The lower level of an ``ImplicitMetaGradientModule``."""

    module: Any

    def registered(self, solutions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the module's meta-parameters."""
        return list(self.module.meta_parameters())

    def backward(self, random: RandomState | None = None) -> contextlib.AbstractContextManager[Any]:
        """Let TorchOpt's backward leave BatchNorm's statistics alone, and draw the random numbers of a sample."""
        return as_differentiated(self.module, random)

    def solver(self) -> Any:
        """Return the solver of the declared kind."""
        return declared_solver(type(self.module).linear_solve, list(self.module.parameters()))


def scalar(closure: Any) -> Callable[[], Any]:
    """Return the closure, checked to return what TorchOpt differentiates."""
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
