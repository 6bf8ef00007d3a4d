"""What Betty has evaluated since a problem's last step, and the loss that a step evaluates again without a trace.

Betty gives optimizers no closure. So ``get_loss`` of a problem is wrapped, on that instance: the log keeps batch,
random state and buffers of each evaluation. One step has ``gradient_accumulation`` of them, one for each
``one_step_descent``, which is wrapped to tell them from what the user evaluates (in a validation, say).

| problem | objective | .grad holds |
|---|---|---|
| has no lower problem | `LowerObjective` | the gradient of the loss |
| has lower problems | `UpperObjective` | a hypergradient: the partial gradients are not known |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError
from adaptive_bilevel.evaluation import Evaluated, Objective
from adaptive_bilevel.evaluation.guard import Snapshot

from .release import Problem, Report, process_gradient

__all__ = ["Evaluation", "EvaluationLog", "LowerObjective", "UpperObjective"]

Projection = Callable[[Sequence[Tensor]], None]


class Evaluation(NamedTuple):
    """One call of ``get_loss`` by Betty, the one that it differentiates.

    Attributes:
        batch: Its batch.
        before: Random state, and buffers of all problems, before it.
        loss: What it returned, without the scale of a GradScaler: the loss / gradient_accumulation, detached.
        report: The dictionary that Betty logs.
    """

    batch: object
    before: Snapshot
    loss: Tensor
    report: Report


@final
class EvaluationLog:
    """The evaluations of one problem since its last step, and their replay.

    Args:
        problem: The problem; ``get_loss``, ``get_batch`` and ``one_step_descent`` are wrapped from now on, on the
            instance.
        problems: All problems of the engine, whose modules the loss may run.

    Attributes:
        evaluations: Those of the present or, between two steps, of the last step.
    """

    def __init__(self, problem: Problem, problems: Sequence[Problem]) -> None:
        self.problem = problem
        self.problems = list(problems)
        self.evaluations: list[Evaluation] = []
        self._complete = True
        self._descending = False
        self._get_loss, self._one_step_descent = problem.get_loss, problem.one_step_descent
        self._get_batch = problem.get_batch
        problem.get_loss, problem.one_step_descent = self._record, self._descend
        problem.get_batch = self._fetch

    def _descend(self, *args: object, **kwargs: object) -> object:
        """Stand for the problem's one_step_descent: the loss that it evaluates first is the one of the step."""
        self._descending = True
        try:
            return self._one_step_descent(*args, **kwargs)
        finally:
            self._descending = False

    def _fetch(self, *args: object, **kwargs: object) -> object:
        """Stand for the problem's get_batch: a loss that chooses a batch is not the one of the step."""
        descending, self._descending = self._descending, False
        try:
            return self._get_batch(*args, **kwargs)
        finally:
            self._descending = descending

    def _record(self, batch: object) -> tuple[Tensor, Report]:
        """Stand for the problem's get_loss."""
        if not self._descending:
            return self._get_loss(batch)
        self._descending = False
        before = self.snapshot()
        loss, report = self._get_loss(batch)
        if self._complete:
            self.evaluations = []
        self.evaluations.append(Evaluation(batch, before, self._unscaled(loss.detach()), report))
        self._complete = self.problem.count % self.problem.gas == 0
        return loss, report

    def _unscaled(self, loss: Tensor) -> Tensor:
        scaler = self.problem.scaler
        # The scale is a power of two, so nothing is rounded.
        return loss if scaler is None or not scaler.is_enabled() else loss / scaler.get_scale()

    # ------------------------------------------------------------------------------------------ what steps ask for

    @property
    def loss(self) -> Tensor:
        """The loss at the present point, as Betty computed it."""
        losses = [evaluation.loss for evaluation in self._known()]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def replay(self) -> Tensor:
        """Return the loss on the same batches with the same randomness, at the parameters as they are now."""
        total: Tensor | None = None
        with self.trial():
            for evaluation in self._known():
                evaluation.before.restore()
                loss = self._unscaled(self._get_loss(evaluation.batch)[0])
                total = loss if total is None else total + loss
        assert total is not None
        return total

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Have ``in_trial`` True inside, at all problems."""
        for problem in self.problems:
            problem.in_trial = True
        try:
            yield
        finally:
            for problem in self.problems:
                problem.in_trial = False

    def snapshot(self) -> Snapshot:
        """Return the present random state and buffers, to be restored after evaluations that leave no trace."""
        modules = [problem.module for problem in self.problems]
        devices = {p.device for module in modules for p in module.parameters()}
        return Snapshot(modules, sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str))

    def _known(self) -> list[Evaluation]:
        if not self.evaluations:
            raise ClosureError(
                f"problem {self.problem.name!r} has not evaluated its loss since bind(engine), so there is no batch to "
                "evaluate again: take steps by engine.run() or problem.step(), and bind before the first one"
            )
        return self.evaluations


@final
class LowerObjective(Objective):
    """The loss of a problem without a lower one.

    Args:
        log: The problem's evaluations.
        project: The projection of its parameters, if there is one; trials are projected.
        projected: Has the parameters projected inside of a ``with``, and as they were outside.
    """

    def __init__(
        self,
        log: EvaluationLog,
        project: Projection | None,
        projected: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._log, self.project, self._projected = log, project, projected

    def __call__(self) -> Tensor:
        """Return the loss on the batches of the step, with the same randomness."""
        if torch.is_grad_enabled() or self.project is None:
            return self._log.replay()
        with self._projected():
            return self._log.replay()

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated:
        """Return what Betty has computed."""
        return Evaluated(self._log.loss, [None if p.grad is None else p.grad.detach() for p in tensors])

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients as Betty would step on them: after grad_callback and clipping."""
        return _processed(self._log.problem, tensors, gradients)


@final
class UpperObjective(Objective):
    """The loss of a problem with lower ones.

    Args:
        log: The problem's evaluations.
        project: The projection of its parameters, if there is one.
    """

    def __init__(self, log: EvaluationLog, project: Projection | None) -> None:
        self._log, self.project = log, project
        self.rescaled = log.problem.gradient_clipping > 0.0

    @property
    def source(self) -> list[object]:
        """The batches of the step."""
        return [evaluation.batch for evaluation in self._log.evaluations]

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
