"""What the roles of a step keep between steps: each role has an entry of its own in the optimizer's state.

The state of a role is plain data: numbers and tensors by name, those of the role and those of each parameter. A role
reads it in ``propose``, and returns from ``commit`` what is new in it; nothing is changed in place, since an old state
may be part of a ``state_dict`` that other code holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["RoleState", "advanced", "read_states", "write_states"]


class RoleState(NamedTuple):
    """The state of one role of a step, or what is new in it.

    Attributes:
        shared: Numbers and tensors by name.
        each: The same for each parameter that takes part in the step, in order; {} for one that is new.
        deferred: Of what is new, tensors of the parameters by name, as functions that compute them (a list, one for
            each parameter) when they are written. One old tensor is then dropped before the next new one is made.
    """

    shared: Mapping[str, Any] = {}
    each: Sequence[Mapping[str, Any]] = ()
    deferred: Mapping[str, Callable[[], Sequence[Any]]] = {}


def read_states(state: Any, initial: Mapping[str, RoleState], tensors: Sequence[Tensor]) -> dict[str, RoleState]:
    """Return the states of roles.

    Args:
        state: The optimizer's.
        initial: The roles by name, each with its state before the first step, as its ``init`` gives it.
        tensors: The parameters that take part in the step.
    """
    known = [state.get(p, {}) for p in tensors]
    return {
        name: RoleState(state.get(name, first.shared), [own.get(name, {}) for own in known])
        for name, first in initial.items()
    }


def write_states(state: Any, news: dict[str, RoleState], tensors: Sequence[Tensor]) -> None:
    """Write what is new in the states of all roles of a step.

    Args:
        state: The optimizer's.
        news: By the roles' names. Emptied on the way, so that nothing old is held by what has been written.
        tensors: The parameters that took part in the step.
    """
    while news:
        name = next(iter(news))
        role = news.pop(name)
        if role.shared:
            shared = {key: value() if callable(value) else value for key, value in role.shared.items()}
            state[name] = {**state.get(name, {}), **shared}
        if not (role.each or role.deferred):
            continue
        owns: list[dict[str, Any]] = []
        for p, own in zip(tensors, role.each or [{}] * len(tensors), strict=True):
            known = state.get(p, {})
            owns.append({**known.get(name, {}), **own})
            state[p] = {**known, name: owns[-1]}
        deferred = dict(role.deferred)
        del role
        for key in list(deferred):
            for own, value in zip(owns, deferred.pop(key)(), strict=True):
                own[key] = value


def advanced(before: RoleState, news: RoleState) -> RoleState:
    """Return the state with what is new in it, everything computed."""
    each = [{**own, **new} for own, new in zip(before.each, news.each or [{} for _ in before.each], strict=True)]
    for key, compute in news.deferred.items():
        for own, value in zip(each, compute(), strict=True):
            own[key] = value
    shared = {key: value() if callable(value) else value for key, value in news.shared.items()}
    return RoleState({**before.shared, **shared}, each)
