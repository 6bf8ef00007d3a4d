"""What the upper optimizers share: the lower level bound to them, and the hypergradient that they find in .grad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import HypergradientError, TensorError
from ..evaluation.counts import Evaluations
from ..evaluation.guard import Workspace
from ..optim.base import AdaptiveOptimizer
from .lower import LowerLevel

__all__ = ["UpperOptimizer"]


class UpperOptimizer(AdaptiveOptimizer):
    """An upper optimizer.

    Copying and pickling keep the lower optimizers (copy or pickle both levels and the model together, and they stay
    one problem) but no closures, so both need a lower step, or lower_closure, before the next upper step.

    Attributes:
        lower: The lower level.
    """

    takes_offers = False
    lower: LowerLevel

    def bind(self, lower: Any) -> None:
        """Set the lower optimizers."""
        self.lower = LowerLevel(lower, self._parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `AdaptiveOptimizer.add_param_group` does.

        Raises:
            TensorError: Also if a tensor belongs to the lower level.
        """
        super().add_param_group(param_group)
        if "lower" in self.__dict__:
            try:
                self.lower.refuse_shared(self.param_groups[-1]["params"])
            except TensorError:
                del self.param_groups[-1]
                raise

    def _prepare(self) -> None:
        super()._prepare()
        self.evaluations = Evaluations()
        self._workspace = Workspace(lasting=False)  # a step has larger things to allocate than the copies

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        return {**super().__getstate__(), "lower": self.lower}

    def _hypergradient(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Return .grad of the upper parameters, which must have been set."""
        self.lower.refuse_shared(params)  # again: its optimizers may have new groups
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise HypergradientError(
                f"{type(self).__name__}.step: .grad of all {len(params)} upper parameters is None. Put the "
                "hypergradient there first, e.g. by adaptive_bilevel.hypergradient.implicit, and do not call zero_grad "
                "in between"
            )
        return grads
