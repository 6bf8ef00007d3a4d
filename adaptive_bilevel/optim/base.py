"""The conduct that all optimizers of this package share: evaluation, starting points, records, warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from ..evaluation import foreach
from ..evaluation.attempts import Attempts
from ..evaluation.closures import Differentiated
from ..evaluation.counts import Counts, Evaluations
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.means import averaged
from ..evaluation.objective import Evaluated, Objective, Replay
from ..evaluation.processes import checked
from ..evaluation.reductions import on_host
from ..evaluation.tensors import gradients_of
from ..evaluation.vectors import inner
from ..policies import SLS, AutoSLS, Record, validation
from ..policies.scalars import Scalar
from .conclusion import ConcludingOptimizer
from .direction import Adam, AdamMetric, Descent, Direction, Gradient, Plain, Proposed
from .options import merged
from .state import RoleState, read_states, write_states
from .warm_start import Parabola, Start, WarmStart, farther_end

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["AdaptiveOptimizer", "Host"]


_PLAIN = Plain()
_PLAIN_PROPOSED = Proposed(Descent(list), _PLAIN, RoleState())


class Host(Protocol):
    """Who steps an optimizer without a closure: a framework that has evaluated the loss itself."""

    def step(self, optimizer: Any) -> Any:
        """Call ``optimizer.advance(...)`` with what was evaluated, mostly an `Objective`, and return the loss."""
        ...


class AdaptiveOptimizer(ConcludingOptimizer):
    """A policy as a `torch.optim.Optimizer`; the concrete rules derive from it.

    `param_groups[i]["lr"]` is the bound (or first trial) of the rule; left out, it is 1 and scales the one that the
    rule found, `param_groups[i]["scale"]`. A schedule is a factor: it scales the bound, and where lr is a first trial,
    the step taken (the search goes on in the length found; a factor above 1 makes the first trial longer, and no step
    longer than the search has found it may be). Groups with different lr share one step: group i moves by step * lr_i /
    lr_0. All other options are the same for all groups.

    Attributes:
        record: The last step's `Record`; None before.
        evaluations: Every oracle call so far; those of the loss that is stepped on are in ``evaluations.lower`` (of the
            upper optimizers, in ``evaluations.upper``).
        sample: The closure of the last step, with its random state and step size; None before the first. An upper
            optimizer may be bound after that step and needs it then, so it is kept until the next step, and with it
            what the closure holds (a batch). Where no level above needs it, set it to None to free that.
        host: Who takes a ``step()`` without a closure; None: a closure is required.
    """

    mixes_momentum: ClassVar[bool] = False
    """Whether the step's momentum is not the direction's affair, see `adaptive_bilevel.bilevel.momentum`."""
    takes_offers: ClassVar[bool] = True
    """Whether the next step decides between two starting points, see `offer`."""
    unbound: ClassVar[Host | None] = None
    """The host of a new optimizer and of a copy: for classes of a host's, which say there how to bind."""

    def _prepare(self) -> None:
        super()._prepare()
        self._workspace.options = self._shared_options
        self._warm_start = WarmStart()
        self.evaluations = Evaluations()
        self.sample: Replay | None = None
        self.host: Host | None = self.unbound  # a copy is the optimizer of no host yet

    def _shared_options(self) -> dict[str, Any]:
        """Return the options that processes which step together need to have in common, by name."""
        names = ("lr", *(name for name in self.defaults if name != "lr"))
        return {name: [group[name] for group in self.param_groups] for name in names}

    @property
    def _own_counts(self) -> Counts:
        """Where oracle calls of the loss that is stepped on are counted."""
        return self.evaluations.lower

    def _restored(self) -> None:
        self._warm_start.restored(self.state, self._parameters())

    @property
    def records(self) -> dict[str, Any]:
        """The records of options, by name: what a class of the same rule takes at construction."""
        return dict(self._records)

    def set_record(self, name: str, record: DataclassInstance) -> None:
        """Put a record of options in the place of the one of that name: it is used, and saved, from now on.

        Args:
            name: The attribute that holds it.
            record: Its options are plain values.
        """
        self._set_records({**self._records, name: record})
        for options in (self.defaults, *self.param_groups):
            options.update(merged([record]))

    def _sample_bound(self, lower_bound: Scalar | None) -> Scalar | None:
        """Return a lower bound that was given to a step, or raise."""
        if lower_bound is None:
            return None
        if not isinstance(lower_bound, Tensor):
            validation.finite(f"{type(self).__name__}.step", "lower_bound", lower_bound, optional=True)
        return validation.plain(lower_bound)

    def _direction(self) -> Direction:
        """Return the Direction role, with Adam's constants as they are now: schedulers may write them."""
        direction = self.conduct.direction
        if not isinstance(direction, str):
            return direction
        if direction == "sgd":
            return _PLAIN
        group = self.param_groups[0]
        if self.mixes_momentum:
            return AdamMetric(group["betas"][1], group["eps"])
        return Adam(group["betas"], group["eps"])

    def _propose(self, gradient: Gradient) -> Proposed:
        """Return the directions at a gradient, with what `_commit_direction` needs."""
        role = self._direction()
        if role is _PLAIN:
            return _PLAIN_PROPOSED
        before = read_states(self.state, {"direction": role.init()}, gradient.tensors)["direction"]
        return Proposed(role.propose(gradient, before), role, before)

    def _commit_direction(self, gradient: Gradient, proposed: Proposed, moved: Tensor | bool = True) -> None:
        """Write what is new in the direction's state."""
        descent, role, before = proposed
        if role is not _PLAIN:
            write_states(self.state, {"direction": role.commit(gradient, descent, before, moved)}, gradient.tensors)

    # ------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, guard: Guard, closure: Closure, params: list[Tensor]) -> Differentiated:
        """Return loss and gradients on the sample; after a prediction, first go to the share of it that is kept.

        See `adaptive_bilevel.optim.warm_start`.
        """
        return self._decide(guard, closure, params, self._warm_start.point(self.state, params), None).found

    def _decide(
        self,
        guard: Guard,
        closure: Closure,
        params: list[Tensor],
        before: list[Tensor] | None,
        random: RandomState | None,
    ) -> Start:
        """Do what `_evaluate` does, and return the share too; `random` replays a sample evaluated elsewhere."""
        known = _evaluated(closure, params) if random is None else None
        if before is None:
            return Start(self._gradient(guard, closure, params, random) if known is None else Differentiated(*known))
        predicted = [p.clone() for p in guard.copy()]
        offset = foreach.sub(predicted, before)

        def go(share: float) -> None:
            foreach.copy_(params, predicted if share == 1.0 else before)
            if 0.0 < share < 1.0:
                foreach.add_(params, offset, alpha=share)
            guard.rebase()

        def gradient(share: float) -> Differentiated:
            go(share)
            if share == 1.0 and known is not None:
                return Differentiated(*known)
            return self._gradient(guard, closure, params, guard.entry)

        share = self._warm_start.share(self.state)
        begun = share.value
        go(farther_end(begun))
        value = Attempts().value(lambda: guard.value(closure, random))
        self._own_counts.values += 1
        found = gradient(begun)
        own = gradients_of(params, params, found.gradients if found.own is None else found.own)
        along, here, there = on_host(inner(own, offset), found.loss, value)
        parabola = Parabola.through(begun, here, along, there)
        after, finite = self._warm_start.look(self.state, parabola), math.isfinite(here) and math.isfinite(along)
        kept = after if not share.known else begun if finite else 0.0
        return Start(found if kept == begun else gradient(kept), kept, parabola.stayed)

    def _measured_along(self, gradient: Gradient, descent: Descent, closure: Closure, loss: Tensor) -> list[Tensor]:
        """Return what the length of a step is found along, without the factors of groups."""
        return descent.precondition(gradient.values)

    def _gradient(
        self, guard: Guard, closure: Closure, params: list[Tensor], random: RandomState | None = None
    ) -> Differentiated:
        """Return loss and gradients here, as a host would step along them."""
        self._own_counts.gradients += 1
        found = guard.differentiated(closure, params, random)
        if isinstance(closure, Objective):
            found = found._replace(gradients=closure.processed(params, found.gradients))
        return found

    @property
    def process_group(self) -> Any:
        """The processes whose losses add up to this one's loss: their mean is stepped on, with the same step on each.

        None: all of `torch.distributed`, where that was begun. A process group: its members. "alone": this process,
        whose parameters are its own. It is no option that is saved or copied. See docs/processes.md.

        Raises:
            OptionError: It is set to something else.
        """
        return self._workspace.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._workspace.group = checked(type(self).__name__, group)

    @property
    def offered(self) -> list[Tensor] | None:
        """The point before a prediction, which the next step may go back to; None if none, or if x was moved since."""
        return self._warm_start.point(self.state, self._parameters())

    def offer(self, points: Sequence[Tensor]) -> None:
        """Offer another starting point for the next step, copies of all parameters in order.

        The level above has moved the parameters to a prediction, and calls this with the point before. The next
        `step(closure)` begins between the two, at the share of the prediction that is best along it on the mean of the
        samples before (`adaptive_bilevel.optim.warm_start`). Whoever else moves the parameters voids the offer.
        """
        self._warm_start.offer(self.state, self._parameters(), points)

    def displaced(self) -> None:
        """Take note that a level above, or a host, has moved the parameters."""

    def upper_moved(self) -> None:
        """Take note that the level above has moved its own variable. It does so before an `offer`."""

    def _drop_offer(self) -> None:
        self._warm_start.drop(self.state, self._parameters())

    # ------------------------------------------------------------------------------------------ conclusion

    def _bound(self) -> tuple[float | None, float]:
        """Return bound and scale of a step's `Context`: lr is one of them, None and 1 the other."""
        lr = self._schedule()[0] if self._unbounded else self._reference_lr()
        return (None, lr) if self.param_groups[0]["automatic"] else (lr, 1.0)

    @property
    def _unbounded(self) -> bool:
        """Whether lr bounds no step but the first: what a scheduler takes from it is then taken from the step found."""
        return isinstance(self.policy, (SLS, AutoSLS))

    def _scheduled(self, found: Record) -> Record:
        """Return the record of the step taken: of one found without a bound, the part that a scheduler has left.

        Searches go on in the length found, since the next one would undo whatever is taken from that.
        """
        left = self._schedule()[1] if self._unbounded else 1.0
        return found if left == 1.0 else found._replace(step_size=found.step_size * left)

    def __repr__(self) -> str:
        """Return the options and the last step."""
        options = {"lr": self.param_groups[0]["lr"], **self._options()}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        last = "" if self.record is None else f"; {self.record.describe()}"
        return f"{type(self).__name__}({listed}{last})"


def _evaluated(closure: Closure, params: list[Tensor]) -> Evaluated | None:
    """Return what a host has evaluated, if it is one; its gradients may be those of this process."""
    known = closure.evaluated(params) if isinstance(closure, Objective) else None
    return None if known is None else known._replace(gradients=averaged(known.gradients, params))
