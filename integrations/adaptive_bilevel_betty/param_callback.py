"""A problem's param_callback as a projection: where trials may lead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from .evaluation_log import EvaluationLog
from .release import call_param_callback, variable

__all__ = ["ParamCallback"]


@final
class ParamCallback:
    """The param_callback of one problem.

    Args:
        log: Of the problem, which knows the engine's problems.
    """

    def __init__(self, log: EvaluationLog) -> None:
        self._log, self._problem = log, log.problem
        self._projects: bool | None = None

    @property
    def projects(self) -> bool:
        """Whether there is one that is a projection: applied twice, it is as applied once.

        Anything else (a decay, say) belongs to the step that is taken, and has no place in a trial.
        """
        if self._projects is None:
            # Also away from here: at 0, a decay does nothing either.
            known = callable(getattr(self._problem, "param_callback", None))
            self._projects = known and self._leaves_others_alone(
                lambda: all(self._is_idempotent(away) for away in (0.0, 1.0, -1.0))
            )
        return self._projects

    def _leaves_others_alone(self, probe: Callable[[], bool]) -> bool:
        """Return the answer of a probe, False if it changed another problem's parameters; they are as before."""
        own = {id(p) for p in self._params()}
        listed = {id(p): p.detach() for problem in self._log.problems for p in problem.module.parameters()}
        others = [p for name, p in listed.items() if name not in own]
        saved = [p.clone() for p in others]
        try:
            answer = probe()
            return answer and all(torch.equal(p, q) for p, q in zip(others, saved, strict=True))
        finally:
            for p, q in zip(others, saved, strict=True):
                p.copy_(q)

    def _is_idempotent(self, away: float) -> bool:
        """Return whether a second call changes nothing, from parameters that are so far away from the present ones."""
        with self.projected(away):
            once = _copies(self._params())
            self._call()
            return all(_same(p.detach(), q) for p, q in zip(self._params(), once, strict=True))

    @contextlib.contextmanager
    def projected(self, away: float = 0.0) -> Iterator[None]:
        """Have the parameters (or others, so far away) projected inside, and as they were outside."""
        saved = _copies(self._params())
        try:
            with torch.no_grad():
                if away != 0.0:
                    torch._foreach_add_([p.detach() for p in self._params()], away)
            self._call()
            yield
        finally:
            _write(self._params(), saved)

    def project(self, tensors: Sequence[Tensor]) -> None:
        """Project tensors that stand for the optimizer's parameters, in order: the parameters themselves, or copies."""
        params = variable(self._problem)
        saved = _copies(params)
        with torch.no_grad():
            try:
                _write(params, tensors)
                self._call()
                projected = _copies(params)
            finally:
                _write(params, saved)
        _write(tensors, projected)

    def _call(self) -> None:
        with self._log.trial():
            call_param_callback(self._problem)

    def _params(self) -> list[Tensor]:
        found: list[Tensor] = list(self._problem.module.parameters())
        return found


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors; a param_callback may have put new storage there since it was last looked at."""
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in tensors], [v.detach() for v in values])


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal up to the rounding of a projection, which involves all of their entries."""
    rounding = 64.0 * torch.finfo(one.dtype).eps
    return bool(torch.isclose(one, other, rtol=rounding, atol=rounding * float(other.abs().max())).all())
