"""How a step ends: its record, its warnings, and the error after too many steps that are not finite."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError, warn
from ..policies import Outcome, Record, State
from ..policies.scalars import Scalar
from .closure_checks import ClosureChecks
from .groups import PolicyOptimizer

__all__ = ["ConcludingOptimizer", "Past"]

_KEPT = 50
"""So many of the last steps are remembered."""

_WARNED = {
    Outcome.search_failed: "Parameters are as before. Often the gradient is not that of the loss which the closure "
    "returns, or the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give lower_bound= a number that the loss never falls below.",
    Outcome.no_descent: "The direction does not descend on the searched function; see optimizer.record.",
}


class Past(NamedTuple):
    """A step that was taken.

    Attributes:
        record: Its record.
        loss: The loss before it.
        hessian: What the solve of an upper search has shown of the lower Hessian; None: there was none.
    """

    record: Record
    loss: Any
    hessian: Any = None


class ConcludingOptimizer(PolicyOptimizer):
    """What an optimizer keeps of its last steps.

    Attributes:
        record: The last step's `Record`; None before.
        history: The last 50 steps, oldest first; not saved. See `adaptive_bilevel.diagnose`.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._warned: dict[int, int] = {}
        self._skips: Scalar = 0
        self._looks = 0
        self._closure_checks = ClosureChecks()
        self.record: Record | None = None
        self.history: deque[Past] = deque(maxlen=_KEPT)

    @property
    def closure_checks(self) -> ClosureChecks:
        """What the searches have shown of the closure."""
        return self._closure_checks

    def _conclude(self, record: Record, state: State, loss: Any, hessian: Any = None) -> None:
        """Keep the record, give the warnings, and count the steps that are not finite."""
        self.record = record
        self.history.append(Past(record, loss.detach() if isinstance(loss, Tensor) else loss, hessian))
        for message in self._closure_checks.take():
            warn(f"{type(self).__name__}: {message}")
        on_device = isinstance(record.step_size, Tensor)
        scale = state.found if self.param_groups[0]["automatic"] else 1.0
        for group, factor in zip(self.param_groups, self._factors(), strict=True):
            if on_device:
                moved = record.step_size > 0
                group["scale"] = torch.where(moved, scale, group["scale"])
                group["step_size"] = torch.where(moved, record.step_size * factor, group["step_size"])
            elif record.step_size > 0.0:
                group["scale"] = scale
                group["step_size"] = record.step_size * factor
        if on_device:
            # Looked at rarely, since looking waits for the device.
            self._skips = torch.where(record.outcome == int(Outcome.non_finite), self._skips + 1, 0)
            self._looks += 1
            if self._looks % self.conduct.max_skips == 0:
                self._refuse_skips(int(self._skips))
            return
        outcome = record.outcome
        self._skips = self._skips + 1 if outcome == Outcome.non_finite else 0
        if outcome in _WARNED:
            self._warn(outcome, f"{Outcome(outcome).sentence}. {_WARNED[outcome]}")
        self._refuse_skips(self._skips)

    def _refuse_skips(self, skips: int) -> None:
        if skips >= self.conduct.max_skips:
            raise NonFiniteError(
                f"{type(self).__name__}: {skips} steps in a row met a loss or gradient that is not finite; nothing "
                "has moved since. Look at the data and the loss, and at what else changes the loss between the steps; "
                f"or raise max_skips={self.conduct.max_skips}"
            )

    def _warn(self, key: int, message: str) -> None:
        """Warn at the 1st, 10th, 100th, ... time."""
        times = self._warned[key] = self._warned.get(key, 0) + 1
        if times in (1, 10, 100, 1000) or times % 10000 == 0:
            warn(f"{type(self).__name__} (time {times}): {message}")
