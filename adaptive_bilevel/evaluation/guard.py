"""A trial leaves no trace: parameters, buffers, gradients and random state come back exactly as they were.

One `Guard` spans one optimizer step. It evaluates the user's closures, on the current point or elsewhere, and puts
everything back by copy (never by adding and subtracting), whatever happens, exceptions and KeyboardInterrupt included:

* parameters: copied into a workspace that is allocated once;
* buffers: of every module that runs inside a closure (found by hooks), BatchNorm's counters included;
* random state: of the CPU and of the parameters' devices; every trial replays the same dropout mask;
* gradients: backward and zero_grad inside a closure reach no ``.grad`` of the user's, which is put aside meanwhile.

Threads share torch's default generators: one that draws meanwhile (loads data) needs a ``torch.Generator`` of its own.

What it cannot see: random generators other than torch's default ones, modules that run only inside a compiled function
(compile the module, not a function around it), and what the closure does to Python objects.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import foreach, processes
from .aside import Aside
from .buffers import Buffers
from .closures import Closure, Differentiated, StandIns, attached, differentiated, value
from .interception import Watching, installed
from .means import joined
from .opened import opened
from .parts import any_in_parts
from .replicas import require_replicas
from .snapshot import RandomState, Snapshot
from .vectors import on_cpu
from .workspace import Workspace

__all__ = ["Closure", "Guard", "RandomState", "Snapshot", "Workspace"]

_MISSING = (NameError, AttributeError, TypeError)
"""What a library fails with if it has swallowed torch's error."""


class Guard:
    """Spans one step: evaluates closures here and elsewhere, and puts everything back.

    Args:
        tensors: The parameters that may move.
        workspace: Kept by the caller from step to step. Its processes are those that means are over inside the block.

    Leaving the block by an exception puts everything back to before the block. Otherwise parameters stay where they
    were last put, and buffers and random state are as after the one evaluation that `mark` named.

    An evaluation with ``random=`` is a replay: buffers and random state are first put back to where they were before
    that sample was drawn. Closures are evaluated inside the block only.
    """

    def __init__(self, tensors: Sequence[Tensor], workspace: Workspace) -> None:
        self._tensors = list(tensors)
        self._workspace = workspace
        self._copies: list[Tensor] = []
        self._origin: list[Tensor] = []
        self._devices: list[torch.device] = []
        if not on_cpu(tensors):
            self._devices = sorted((d for d in {p.device for p in tensors} if d.type not in ("cpu", "meta")), key=str)
        self._buffers = Buffers(variables=self._tensors)
        self._marked: RandomState | None = None
        self._stand_ins: list[tuple[Tensor, Tensor | None]] = []
        self._outer = Watching.now()
        self._grads: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in self._tensors if p.is_leaf]

    def __enter__(self) -> Guard:
        self.entry = RandomState(self._devices)
        self._group = processes.of_group(self._workspace.group)
        opened.guards.append(self)
        installed.enter(self)
        if not any(map(is_lazy, self._tensors)):
            self.copy()  # before any evaluation: the first one may change a parameter and raise
            try:
                require_replicas(self._tensors, self._workspace)
            except BaseException:
                self.abandon()
                raise
        return self

    def spans(self, known: set[int]) -> bool:
        """Return whether one of its tensors is among these, given by their ids."""
        return any(id(p) in known for p in self._tensors)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
            return
        if self._marked is not None:
            self.recall()
        installed.leave(self)
        torch.clear_autocast_cache()
        self._close()

    def abandon(self) -> None:
        """Put everything back to before the block, and leave it, also where an interrupt has come in between."""
        self._outer.restore()
        self.undo()
        for p, grad in self._grads:
            p.grad = grad
        installed.leave(self)
        torch.clear_autocast_cache()
        self._close()

    def _close(self) -> None:
        if self in opened.guards:
            opened.guards.remove(self)
            processes.of_group(self._group)

    def random_state(self) -> RandomState:
        """Return the present random state, to replay the next evaluation later."""
        return RandomState(self._devices)

    def mark(self) -> None:
        """Take the present buffers and random state as those to leave behind."""
        self._marked = RandomState(self._devices)
        if self._buffers.slots:
            self._buffers.mark()

    def recall(self) -> None:
        """Put buffers and random state back to where they were when `mark` was called, and forget that mark."""
        assert self._marked is not None
        self._marked.restore()
        self._marked = None
        if self._buffers.slots:
            with torch.no_grad():
                self._buffers.to_after()

    def rewind(self) -> None:
        """Put buffers and random state back, to be left as `mark` named: for evaluations of another guard meanwhile."""
        with torch.no_grad():
            self._buffers.to_before()
        self.entry.restore()

    def undo(self) -> None:
        """Put everything back to before the block."""
        if origin := self._origin or self._copies:
            with torch.no_grad():
                foreach.copy_(self._tensors, origin)
        self.withdraw()

    def withdraw(self) -> None:
        """Put buffers and random state back to before the block, and leave none behind."""
        self.rewind()
        self._marked = None

    def keep_buffers_if(self, valid: Tensor) -> None:
        """Put the buffers back to before the block unless `valid` holds, which stays on its device.

        Where an evaluation was marked, they are those of that one; the mark is done with.
        """
        if self._marked is not None:
            self.recall()
        with torch.no_grad():
            self._buffers.keep_if(valid)

    def copy(self) -> list[Tensor]:
        """Copy the parameters, once, and return the copies."""
        if not self._copies and self._tensors:
            copies = self._workspace.fit(self._tensors)
            with torch.no_grad():
                foreach.copy_(copies, self._tensors)
            self._copies = copies
        return self._copies

    def rebase(self) -> None:
        """Make the present parameters those that `put_back` returns to; `undo` still returns to the first ones."""
        self._origin = self._origin or [c.clone() for c in self.copy()]
        with torch.no_grad():
            foreach.copy_(self._copies, self._tensors)

    def put_back(self) -> None:
        """Copy the parameters back."""
        if self._copies:
            with torch.no_grad():
                foreach.copy_(self._tensors, self._copies)

    def gradient(
        self, closure: Closure, inputs: Sequence[Tensor], random: RandomState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss at the present point and its own gradients (None for frozen tensors)."""
        found = self.differentiated(closure, inputs, random)
        return found.loss, found.gradients if found.own is None else found.own

    def differentiated(
        self, closure: Closure, inputs: Sequence[Tensor], random: RandomState | None = None
    ) -> Differentiated:
        """Return the loss at the present point, and the gradients that the closure left; no ``.grad`` changes.

        The backward is a true one restricted to `inputs`, so hooks (DistributedDataParallel's among them) run. The
        gradients are means over the processes; the loss is this process's own.
        """
        replicated, workspace = self._buffers.replicated, self._workspace
        found = joined(lambda: self._differentiated(closure, inputs, random), inputs, replicated)
        workspace.wrapped = bool(workspace.wrapped) or replicated.found
        return found

    def _differentiated(self, closure: Closure, inputs: Sequence[Tensor], random: RandomState | None) -> Differentiated:
        wanted = [p for p in inputs if p.requires_grad]
        with self._gradients_aside(inputs):
            self._prepare(random)
            found = differentiated(closure, wanted, self._buffers, self._asks(wanted))
        if len(wanted) < len(inputs):
            found = found._replace(
                gradients=_spread(inputs, wanted, found.gradients),
                own=None if found.own is None else _spread(inputs, wanted, found.own),
            )
        self._stand_ins = list(zip(inputs, found.gradients, strict=True)) if found.looked else []
        return found

    def _asks(self, wanted: Sequence[Tensor]) -> bool:
        """Return whether a gradient may begin an exchange, and it is worth to ask first whether a process has failed.

        On an accelerator this would wait for the device; there it is done for tensors in parts only.
        """
        if processes.count() == 1:
            return False
        return any_in_parts(wanted) or (self._workspace.wrapped is not False and processes.home().type == "cpu")

    def _in_the_place_of_gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return what a closure that calls backward finds in ``.grad`` where nothing is differentiated."""
        known = {id(p): g for p, g in self._stand_ins}
        return [(p, known.get(id(p))) for p in self._tensors if p.requires_grad]

    def attached(self, closure: Closure, random: RandomState | None = None) -> Tensor:
        """Return the loss at the present point with its graph; this process's own."""
        return processes.together(lambda: self._attached(closure, random))

    def _attached(self, closure: Closure, random: RandomState | None) -> Tensor:
        with self._gradients_aside():
            self._prepare(random)
            return attached(closure, self._buffers, self._in_the_place_of_gradients)

    def value(self, closure: Closure, random: RandomState | None = None) -> Tensor | float:
        """Return the loss at the present point (one forward), the mean over the processes."""
        return processes.value_of(lambda: self._value(closure, random))

    def _value(self, closure: Closure, random: RandomState | None) -> Tensor | float:
        stand_ins: StandIns = self._in_the_place_of_gradients
        with self._gradients_aside():
            if not self._workspace.trials_need_grad:
                random = random or RandomState(self._devices)
                try:
                    self._prepare(random)
                    return value(closure, self._buffers, stand_ins)
                except Exception as error:
                    # An unrolled loop cannot run without gradients.
                    if "require grad" not in str(error) and not isinstance(error, _MISSING):
                        raise
            self._prepare(random)
            found, self._workspace.trials_need_grad = value(closure, self._buffers, stand_ins, with_grad=True), True
            return found

    def _gradients_aside(self, inputs: Sequence[Tensor] = ()) -> Aside:
        """Take every .grad away while a closure runs, so that whatever it does to gradients meets nothing."""
        if len(inputs) == len(self._tensors) and all(map(operator.is_, inputs, self._tensors)):
            return Aside(self._tensors)
        known = {id(p) for p in self._tensors}
        return Aside([*self._tensors, *(p for p in inputs if id(p) not in known)])

    def _prepare(self, random: RandomState | None) -> None:
        """Put buffers and random state back for a replay."""
        if random is not None:
            if self._buffers.slots:
                with torch.no_grad():
                    self._buffers.to_before()
            random.restore()
        # Autocast caches casts of the parameters for as long as its outermost block lasts; ours have moved since.
        torch.clear_autocast_cache()


def _spread(
    inputs: Sequence[Tensor], wanted: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return a gradient for each input, None for those that were not wanted."""
    known = {id(p): g for p, g in zip(wanted, gradients, strict=True)}
    return [known.get(id(p)) for p in inputs]
