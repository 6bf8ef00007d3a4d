"""What the upper optimizers share: their lower level, and the hypergradient that they find in .grad."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ClosureError, HypergradientError, LowerLevelError, OptionError, TensorError
from ..evaluation.closures import require_closure
from ..evaluation.counts import Counts
from ..evaluation.guard import Closure, Guard, Workspace
from ..evaluation.objective import Objective
from ..evaluation.opened import closing
from ..hypergradient.difference_lengths import restore_lengths, saved_lengths
from ..optim.base import AdaptiveOptimizer
from .between_steps import BetweenSteps
from .functional import FunctionalLower, UpperLoss
from .hidden_level import HiddenLevel
from .lower import Lower, as_lower, refuse_shared
from .source import DIRECT, DirectLoss, Source, checked_source, estimated, matched

__all__ = ["UpperOptimizer"]

_LENGTHS = "difference_lengths"


class UpperOptimizer(AdaptiveOptimizer):
    """An upper optimizer; `BiSLS`, `BiSPS` and `OneStepBiSLS` derive from it.

    Copying and pickling keep the lower optimizers (copy or pickle both levels and the model together, and they stay
    one problem) but no closures, so both need a lower step, or lower_closure, before the next upper step.

    Attributes:
        lower: The lower level.
    """

    lower: Lower
    _source: Source = None
    _lengths: Mapping[str, Any] = {}

    @property
    def hypergradient(self) -> Source:
        """Where the hypergradient comes from if a step is not given one; None: from ``.grad``."""
        return self._source

    @hypergradient.setter
    def hypergradient(self, source: Any) -> None:
        self._source = checked_source(type(self).__name__, source)

    @property
    def answer(self) -> Any:
        """The lower variable of a step with ``lower=(tensors, loss)``, as the step left it: where a warm start goes on.

        It is y, moved along with x (or y itself with ``carry=False``): new leaves, arranged as the tensors that were
        given, which require a gradient if those did.

        Raises:
            LowerLevelError: The last step was given no such variable.
        """
        if not isinstance(self.lower, FunctionalLower) or self.lower.open:
            raise LowerLevelError(
                f"{type(self).__name__}.answer: the last step was not given lower=(tensors, loss). The parameters of a "
                "lower optimizer are moved in place"
            )
        return self.lower.variable()

    def bind(self, lower: Any) -> None:
        """Set the lower level.

        Args:
            lower: A lower optimizer, a list of them, None, or a `Lower`.

        Raises:
            OptionError: It is something else.
            TensorError: The levels share a tensor, or one is of a kind that cannot be stepped.
        """
        before = self.__dict__.get("lower")
        self.rebind(lower)
        if before is None or list(map(id, before.tensors())) != list(map(id, self.lower.tensors())):
            self._forget()

    def rebind(self, lower: Any) -> None:
        """Do what `bind` does, if the new tensors continue the old ones: for hosts that make them anew in each step."""
        level = as_lower(lower)
        refuse_shared(level, self._parameters())
        self._follow(level)
        self._between.forget()

    def _follow(self, level: Lower) -> None:
        """Take a lower level."""
        self.lower = level

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

    def _forget(self) -> None:
        """Drop what is known of the last step, since a host or a level above has moved x or y."""
        self._between.forget()

    def _prepare(self) -> None:
        super()._prepare()
        self._between = BetweenSteps()
        self._workspace = Workspace(
            lasting=False, options=self._shared_options
        )  # a step has larger things to allocate than the copies

    def displaced(self) -> None:
        """Take note that a level above, or a host, has moved the parameters."""
        self._forget()

    def _restored(self) -> None:
        super()._restored()
        self._forget()
        self._between.hidden = HiddenLevel()
        if self._lengths:  # of a copy
            restore_lengths(self.lower.tensors(), self._lengths)

    @property
    def _own_counts(self) -> Counts:
        return self.evaluations.upper

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved, as `AdaptiveOptimizer.state_dict` does; also the lengths of differences in y."""
        entries, lengths = self._entries(), saved_lengths(self.lower.tensors())
        if lengths:
            entries[_LENGTHS] = lengths
        try:
            return super().state_dict()
        finally:
            entries.pop(_LENGTHS, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._lengths = self._entries().pop(_LENGTHS, {})
        restore_lengths(self.lower.tensors(), self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        kept = {"lower": self.lower, "_source": self._source, "_lengths": saved_lengths(self.lower.tensors())}
        return {**super().__getstate__(), **kept}

    def _one_closure(self, upper_closure: UpperLoss | None, closure: UpperLoss | None) -> UpperLoss | None:
        """Return the closure of a step, under either of its names."""
        if closure is None:
            return upper_closure
        if upper_closure is not None:
            raise ClosureError(
                f"{type(self).__name__}.step(upper_closure=..., closure=...): two names of the upper loss; give one of "
                "the two, and the lower loss as lower_closure="
            )
        return closure

    @closing
    @torch.no_grad()
    def advance(
        self,
        upper_closure: UpperLoss | None = None,
        lower_closure: Any = None,
        *,
        lower: Any = None,
        hypergradient: Any = None,
        **options: Any,
    ) -> Tensor | float:
        """Do what `step` does, without torch's hooks around it: for hosts, whose own step is hooked already."""
        if lower is None and isinstance(self.lower, FunctionalLower):
            raise LowerLevelError(
                f"{type(self).__name__}.step: the steps before had lower=(tensors, loss), and this one has not; pass "
                "it again, or call bind(None) where the upper loss depends on no lower variable any more"
            )
        source = self._source if hypergradient is None else hypergradient
        if lower is None and source is None:
            return self._advance(upper_closure, lower_closure, None, **options)
        before, params = self.lower, self._parameters()
        level = None if lower is None else self._functional(lower, before, params)
        try:
            with Guard(
                params, Workspace(group=self.process_group)
            ):  # buffers and random state, where an estimator draws from it
                if level is not None:
                    if upper_closure is not None:
                        upper_closure = level.upper(type(self).__name__, upper_closure)
                    self._follow(level)
                closure, given = self._sourced(source, upper_closure, lower_closure, params)
                return self._advance(closure, lower_closure, given, **options)
        except BaseException:
            self.lower = before
            raise
        finally:
            if level is not None:
                level.close()

    @abc.abstractmethod
    def _advance(
        self, upper_closure: Closure | None, lower_closure: Any, hypergradient: list[Tensor | None] | None
    ) -> Tensor | float:
        """Take the step; without a hypergradient, along .grad."""

    def _functional(self, lower: Any, before: Lower, params: Sequence[Tensor]) -> FunctionalLower:
        """Return the lower level that a step was given."""
        owner = type(self).__name__
        if not isinstance(before, FunctionalLower) and (not hasattr(before, "optimizers") or before.optimizers):
            raise OptionError(
                f"{owner}.step(lower=...): this optimizer is bound to a lower level already. Leave lower= out of the "
                f"constructor, as in {owner}(x), or out of the step"
            )
        level = FunctionalLower.of(owner, lower)
        level.refuse_shared(params)
        level.require_form(owner, before)
        restore_lengths(level.tensors(), saved_lengths(before.tensors()) or self._lengths)
        return level

    def _sourced(
        self, source: Any, closure: Closure | None, lower_closure: Any, params: list[Tensor]
    ) -> tuple[Closure | None, list[Tensor | None] | None]:
        """Return the upper closure of a step, and its hypergradient if that is not in .grad."""
        owner = type(self).__name__
        if source is None:
            return closure, None
        tensors = isinstance(source, Tensor) or (
            isinstance(source, Sequence) and all(h is None or isinstance(h, Tensor) for h in source)
        )
        if tensors and not isinstance(source, str):
            return closure, matched(owner, params, source)
        source = checked_source(f"{owner}.step", source)
        closure = require_closure(owner, closure)
        if source != DIRECT:
            refuse_shared(self.lower, params)
            if isinstance(self.lower, FunctionalLower):
                y: Any = self.lower.variable()
            else:
                y = self.lower.tensors()
            with Guard(params, Workspace(group=self.process_group)) as guard:
                problems = self.lower.problems(lower_closure, guard)
            counts, group, products = self.evaluations, self.process_group, self.defaults.get("products", "auto")
            return closure, estimated(owner, source, closure, problems, params, y, counts, group, products)
        if self.lower.tensors() or isinstance(closure, Objective):
            raise OptionError(
                f"{owner}(hypergradient='direct'): the upper loss is a function of the upper parameters alone, so "
                "there is no lower level; leave lower= out"
            )
        return DirectLoss(closure), None

    def _begin(
        self, guard: Guard, objective: Closure | None, params: list[Tensor], given: list[Tensor | None] | None
    ) -> list[Tensor | None]:
        """Return the hypergradient of the step, with None where there is none."""
        if isinstance(objective, DirectLoss):
            return self._hypergradient(params, objective.begin(guard, params, self.evaluations))
        return self._hypergradient(params, given)

    def _hypergradient(self, params: Sequence[Tensor], given: list[Tensor | None] | None = None) -> list[Tensor | None]:
        """Return the hypergradient that was given, or .grad of the upper parameters, which must have been set."""
        refuse_shared(self.lower, params)  # again: its optimizers may have new groups
        owner = type(self).__name__
        if given is not None:
            if all(g is None for g in given):
                raise HypergradientError(
                    f"{owner}.step: the hypergradient that is given is of no upper parameter that requires a gradient, "
                    "so none moves. Call requires_grad_() on those that should"
                )
            return given
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise HypergradientError(
                f"{owner}.step: .grad of all {len(params)} upper parameters is None. Put the hypergradient there "
                "first, e.g. by adaptive_bilevel.hypergradient.implicit, and do not call zero_grad in between; or give "
                "it as hypergradient= to the step or to the constructor"
            )
        if all(not p.requires_grad for p, g in zip(params, grads, strict=True) if g is not None):
            raise HypergradientError(
                f"{owner}.step: .grad of upper parameters is set, but each of them has requires_grad=False, so none "
                "moves. Call requires_grad_() on those that should"
            )
        return grads
