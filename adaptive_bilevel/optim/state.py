"""What the roles of a step keep between steps: each role has an entry of its own in the optimizer's state.

The state of a role is plain data: numbers and tensors by name, those of the role and those of each parameter. A role
reads it in ``propose`` and returns the next one from ``commit``; nothing is changed in place, since an old state may be
part of a ``state_dict`` that somebody holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["RoleState", "read_state", "write_states"]


class RoleState(NamedTuple):
    """The state of one role of a step.

    Attributes:
        shared: Numbers and tensors by name.
        each: The same for each parameter that takes part in the step, in order; {} for one that is new.
    """

    shared: Mapping[str, Any] = {}
    each: Sequence[Mapping[str, Any]] = ()


def read_state(state: Any, name: str, tensors: Sequence[Tensor], initial: RoleState = RoleState()) -> RoleState:  # noqa: B008
    """Return the state of a role.

    Args:
        state: The optimizer's.
        name: Of the role.
        tensors: The parameters that take part in the step.
        initial: Before the first step, as the role's ``init`` gives it.
    """
    return RoleState(state.get(name, initial.shared), [state.get(p, {}).get(name, {}) for p in tensors])


def write_states(state: Any, entries: Sequence[tuple[str, Sequence[Tensor], RoleState]]) -> None:
    """Write the next states of all roles of a step: name, parameters and state of each."""
    for name, tensors, after in entries:
        if after.shared or name in state:
            state[name] = dict(after.shared)
        for p, own in zip(tensors, after.each, strict=False):
            if own or name in state.get(p, {}):
                state[p] = {**state[p], name: dict(own)}
