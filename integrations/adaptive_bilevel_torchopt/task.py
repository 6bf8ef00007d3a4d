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

from adaptive_bilevel.errors import ClosureError, HypergradientError, LowerLevelError
from adaptive_bilevel.optim.base import AdaptiveOptimizer
from adaptive_bilevel.optim.polyak import PolyakOptimizer

from .direction import as_direction
from .host_module import fingerprint, same
from .rules import resolve

__all__ = ["Lower", "Rule", "Task", "attached", "scalar"]

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


class Rule:
    """Makes a core optimizer for some tensors."""

    def __init__(self, owner: str, rule: Any, lr: float | None, direction: Any, options: dict[str, Any]) -> None:
        self.cls, self.lr, self.options = resolve(owner, rule, lr, options, upper=False)
        self.options["direction"] = as_direction(direction)
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


def attached(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse parameters that are not the outcome of a differentiable solve()."""
    if any(p.grad_fn is None for p in params):
        raise HypergradientError(
            f"{owner}: the lower parameters do not come from a solve() since the last upper step, so TorchOpt has no "
            "graph for the hypergradient. Call solve() with gradients enabled right before step()"
        )


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
