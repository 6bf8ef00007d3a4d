"""The conduct that all optimizers of this package share: evaluation, starting points, records, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from ..evaluation.closures import Differentiated
from ..evaluation.counts import Counts, Evaluations
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.means import averaged
from ..evaluation.objective import Evaluated, Objective, Replay
from ..evaluation.processes import checked
from ..policies import SLS, AutoSLS, Record, validation
from ..policies.scalars import Scalar
from .conclusion import ConcludingOptimizer
from .direction import Adam, AdamMetric, Descent, Direction, Gradient, Plain, Proposed
from .options import merged
from .state import RoleState, read_states, write_states

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
    unbound: ClassVar[Host | None] = None
    """The host of a new optimizer and of a copy: for classes of a host's, which say there how to bind."""

    def _prepare(self) -> None:
        super()._prepare()
        self._workspace.options = self._shared_options
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

    def _evaluate(
        self, guard: Guard, closure: Closure, params: list[Tensor], random: RandomState | None = None
    ) -> Differentiated:
        """Return loss and gradients on the sample; `random` replays one that was evaluated elsewhere."""
        known = _evaluated(closure, params) if random is None else None
        return self._gradient(guard, closure, params, random) if known is None else Differentiated(*known)

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

    def displaced(self) -> None:
        """Take note that a level above, or a host, has moved the parameters."""

    def upper_moved(self) -> None:
        """Take note that the level above has moved its own variable, after it has moved these (see `displaced`)."""

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
