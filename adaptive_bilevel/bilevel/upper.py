"""What the upper optimizers share: their lower level, and the hypergradient that they find in .grad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ClosureError, HypergradientError, TensorError
from ..evaluation.counts import Counts
from ..evaluation.guard import Closure, Workspace
from ..optim.base import AdaptiveOptimizer
from .between_steps import BetweenSteps
from .lower import Lower, as_lower, refuse_shared

__all__ = ["UpperOptimizer"]


class UpperOptimizer(AdaptiveOptimizer):
    """An upper optimizer; `BiSLS`, `BiSPS` and `OneStepBiSLS` derive from it.

    Copying and pickling keep the lower optimizers (copy or pickle both levels and the model together, and they stay
    one problem) but no closures, so both need a lower step, or lower_closure, before the next upper step.

    Attributes:
        lower: The lower level.
    """

    takes_offers = False
    lower: Lower

    def bind(self, lower: Any) -> None:
        """Set the lower level.

        Args:
            lower: A lower optimizer, a list of them, None, or a `Lower`.

        Raises:
            OptionError: It is something else.
            TensorError: The levels share a tensor, or one is of a kind that cannot be stepped.
        """
        level = as_lower(lower)
        refuse_shared(level, self._parameters())
        self.lower = level
        self._between.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `AdaptiveOptimizer.add_param_group` does.

        Raises:
            TensorError: Also if a tensor belongs to the lower level.
        """
        super().add_param_group(param_group)
        if "lower" in self.__dict__:
            try:
                refuse_shared(self.lower, self.param_groups[-1]["params"])
            except TensorError:
                del self.param_groups[-1]
                raise

    def _prepare(self) -> None:
        super()._prepare()
        self._between = BetweenSteps()
        self._workspace = Workspace(lasting=False)  # a step has larger things to allocate than the copies

    def displaced(self) -> None:
        """Take note that a level above, or a host, has moved the parameters."""
        self._between.forget()

    def _restored(self) -> None:
        super()._restored()
        self._between.forget()

    @property
    def _own_counts(self) -> Counts:
        return self.evaluations.upper

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        return {**super().__getstate__(), "lower": self.lower}

    def _one_closure(self, upper_closure: Closure | None, closure: Closure | None) -> Closure | None:
        """Return the closure of a step, under either of its names."""
        if closure is None:
            return upper_closure
        if upper_closure is not None:
            raise ClosureError(
                f"{type(self).__name__}.step(upper_closure=..., closure=...): two names of the upper loss; give one of "
                "the two, and the lower loss as lower_closure="
            )
        return closure

    def _hypergradient(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Return .grad of the upper parameters, which must have been set."""
        refuse_shared(self.lower, params)  # again: its optimizers may have new groups
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise HypergradientError(
                f"{type(self).__name__}.step: .grad of all {len(params)} upper parameters is None. Put the "
                "hypergradient there first, e.g. by adaptive_bilevel.hypergradient.implicit, and do not call zero_grad "
                "in between"
            )
        if all(not p.requires_grad for p, g in zip(params, grads, strict=True) if g is not None):
            raise HypergradientError(
                f"{type(self).__name__}.step: .grad of upper parameters is set, but each of them has "
                "requires_grad=False, so none moves. Call requires_grad_() on those that should"
            )
        return grads
