"""The lower loop inside a module's ``solve()``: its step sizes outlive the call, although the parameters are new."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS
from adaptive_bilevel.errors import LowerLevelError, TensorError
from adaptive_bilevel.evaluation.guard import RandomState
from adaptive_bilevel.optim.base import AdaptiveOptimizer

from .refusals import attached, check_lower, check_module, refuse_solution
from .task import ModuleLower, Rule, Task, scalar

__all__ = ["LowerStep"]


class LowerStep(ModuleLower):
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
        self.tasks = [Task(Rule("LowerStep", rule, lr, direction, options))]

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
        known = self.tasks[0].params()
        # After a solve() the parameters are TorchOpt's tensors, which say nothing about what the user wants.
        if not known or list(map(id, params)) == list(map(id, known)):
            check_lower("LowerStep.attach", params)
        self.cut()
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
        loss: Tensor = stepping.step(scalar(closure), **options)
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
        self.cut()
        with torch.no_grad():
            for p, v in zip(own, values, strict=True):
                p.copy_(v.detach())

    def cut(self) -> None:
        """Cut the parameters from TorchOpt's graph, e.g. to deepcopy the module after solve()."""
        params = list(self.module.parameters())
        self.tasks[0].marks.note(params)
        for p in params:
            p.detach_().requires_grad_()

    def ready(self, solution: Any) -> list[Sequence[Tensor]]:
        """Return the module's parameters after solve()."""
        refuse_solution(solution)
        params = list(self.module.parameters())
        attached("UpperStep", params)
        self.tasks[0].check("UpperStep", params)
        return [params]

    def backward(self, random: RandomState | None = None) -> contextlib.AbstractContextManager[Any]:
        """Let TorchOpt's backward see the last lower step's random numbers."""
        sample = None if self.optimizer is None else self.optimizer.sample
        return super().backward(random if sample is None else sample.random)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the steps: numbers and tensors."""
        return self.tasks[0].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it; before the first `attach`, it is kept until then."""
        self.tasks[0].load_state_dict(state)
