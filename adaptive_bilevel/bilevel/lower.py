"""The lower level as an upper step sees it: its tensors, and the sample that its optimizer stepped on last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import ClosureError, LowerLevelError, OptionError, TensorError
from ..evaluation.guard import Closure, Guard
from ..evaluation.tensors import refuse_unsupported
from ..optim.base import AdaptiveOptimizer, Sample

__all__ = ["LowerLevel"]


class LowerLevel:
    """One or several lower optimizers, whose losses add up to one lower loss.

    Args:
        lower: Any torch optimizer, a list of them, or None.
        upper: The upper parameters, none of which may be a lower one.
    """

    def __init__(self, lower: Any, upper: Sequence[Tensor]) -> None:
        listed = [] if lower is None else list(lower) if isinstance(lower, (list, tuple)) else [lower]
        for optimizer in listed:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise OptionError(
                    f"lower={type(optimizer).__name__}: lower must be the optimizer of the lower level (any "
                    "torch.optim.Optimizer), a list of them, or None"
                )
        self.optimizers: list[torch.optim.Optimizer] = listed
        for p in self.tensors():
            refuse_unsupported("the lower level", p)
        self.refuse_shared(upper)

    def refuse_shared(self, upper: Sequence[Tensor]) -> None:
        """Raise if an upper parameter is a lower one, too."""
        own = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        shapes = [tuple(p.shape) for p in upper if id(p) in own]
        if shapes:
            raise TensorError(
                f"the upper and the lower level share tensors of shapes {shapes}: each tensor belongs to one level; "
                "give the lower optimizer its own parameters only"
            )

    def __bool__(self) -> bool:
        return bool(self.optimizers)

    def tensors(self) -> list[Tensor]:
        """Return the lower variable: every trainable parameter of the lower optimizers, once."""
        found = {
            id(p): p for o in self.optimizers for group in o.param_groups for p in group["params"] if p.requires_grad
        }
        return list(found.values())

    def samples(self, closures: Any, guard: Guard) -> list[Sample]:
        """Return the last sample of each lower optimizer, or those of the closures that were passed."""
        given = [None] * len(self.optimizers)
        if closures is not None:
            given = list(closures) if isinstance(closures, (list, tuple)) else [closures]
            if len(given) != len(self.optimizers):
                raise LowerLevelError(
                    f"lower_closure has {len(given)} closures for {len(self.optimizers)} lower optimizers: pass one "
                    "for each, in the same order"
                )
            for closure in given:
                if not (closure is None or callable(closure)):
                    raise ClosureError(
                        f"step(lower_closure={closure!r}): pass a function that returns the lower loss, e.g. "
                        "lower_closure=lambda: lower_loss(x, y), or a list of them"
                    )
        return [self._sample(o, c, guard) for o, c in zip(self.optimizers, given, strict=True)]

    @staticmethod
    def _sample(optimizer: torch.optim.Optimizer, closure: Closure | None, guard: Guard) -> Sample:
        remembered = optimizer.sample if isinstance(optimizer, AdaptiveOptimizer) else None
        if closure is not None:
            step = remembered.step_size if remembered is not None else _step_size(optimizer)
            return Sample(closure, guard.random_state(), step)
        if remembered is None:
            remedy = (
                "take lower steps with a closure first, or pass step(..., lower_closure=...)"
                if isinstance(optimizer, AdaptiveOptimizer)
                else "it remembers no closure, so pass step(..., lower_closure=lambda: lower_loss)"
            )
            raise LowerLevelError(f"the lower optimizer {type(optimizer).__name__} has no sample to evaluate: {remedy}")
        return remembered

    @property
    def takes_offers(self) -> bool:
        """Whether a prediction would reach anyone."""
        return any(map(_takes_offers, self.optimizers))

    def predict(self, offsets: Sequence[Tensor]) -> None:
        """Move y by the predicted response where the lower optimizer can take it back, and offer it to do so."""
        by_id = {id(p): offset for p, offset in zip(self.tensors(), offsets, strict=True)}
        for optimizer in self.optimizers:
            if not _takes_offers(optimizer):
                continue  # in three levels, the middle one's optimizer may be an upper one, too
            params = [p for group in optimizer.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in params]
            moved = [p for p in params if id(p) in by_id]
            torch._foreach_add_(moved, [by_id[id(p)] for p in moved])
            optimizer.offer(before)


def _takes_offers(optimizer: torch.optim.Optimizer) -> TypeGuard[AdaptiveOptimizer]:
    return isinstance(optimizer, AdaptiveOptimizer) and optimizer.takes_offers


def _step_size(optimizer: torch.optim.Optimizer) -> float:
    """Return the step of a stock optimizer: its lr."""
    return float(optimizer.param_groups[0]["lr"])
