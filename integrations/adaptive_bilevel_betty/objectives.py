"""The loss of a problem as its optimizer's step sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from adaptive_bilevel.evaluation import Evaluated, Objective

from .evaluation_log import EvaluationLog
from .param_callback import ParamCallback
from .release import Problem, process_gradient

__all__ = ["LowerObjective", "UpperObjective"]


@final
class LowerObjective(Objective):
    """The loss that a problem looks ahead into none for: Betty has put its gradient into .grad.

    Without gradients it is the loss where the problem's param_callback leads to, if that is a projection.

    Args:
        log: The problem's evaluations.
        callback: Its param_callback.
    """

    def __init__(self, log: EvaluationLog, callback: ParamCallback) -> None:
        self._log, self._callback = log, callback
        self.project = callback.project if callback.projects else None

    def __call__(self) -> Tensor:
        """Return the loss on the batches of the step, with the same randomness."""
        if torch.is_grad_enabled() or self.project is None:
            return self._log.replay()
        with self._callback.projected():
            return self._log.replay()

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated:
        """Return what Betty has computed."""
        return Evaluated(self._log.loss, [None if p.grad is None else p.grad.detach() for p in tensors])

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients as Betty would step on them: after grad_callback and clipping."""
        return _processed(self._log.problem, tensors, gradients)


@final
class UpperObjective(Objective):
    """The loss of a problem whose .grad is a hypergradient, so that the partial gradients are not known.

    Args:
        log: The problem's evaluations.
        callback: Its param_callback.
    """

    def __init__(self, log: EvaluationLog, callback: ParamCallback) -> None:
        self._log = log
        self.project = callback.project if callback.projects else None
        self.rescaled = log.problem.gradient_clipping > 0.0

    def __call__(self) -> Tensor:
        """Return the loss on the batches of the step, with the same randomness."""
        return self._log.replay()

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients as Betty would step on them: after grad_callback and clipping."""
        return _processed(self._log.problem, tensors, gradients)


def _processed(problem: Problem, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    held = [p.grad for p in params]
    try:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        process_gradient(problem)
        return [None if p.grad is None else p.grad.detach() for p in params]
    finally:
        for p, g in zip(params, held, strict=True):
            p.grad = g
