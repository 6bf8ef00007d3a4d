"""What the roles of a step keep between steps: each role has an entry of its own in the optimizer's state.

The state of a role is plain data: numbers and tensors by name, those of the role and those of each parameter. A role
reads it in ``propose``, and returns from ``commit`` what is new in it; nothing is changed in place, since an old state
may be part of a ``state_dict`` that somebody holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["RoleState", "advanced", "read_state", "write_states"]


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


def read_state(state: Any, name: str, tensors: Sequence[Tensor], initial: RoleState = RoleState()) -> RoleState:  # noqa: B008
    """Return the state of a role.

    Args:
        state: The optimizer's.
        name: Of the role.
        tensors: The parameters that take part in the step.
        initial: Before the first step, as the role's ``init`` gives it.
    """
    return RoleState(state.get(name, initial.shared), [state.get(p, {}).get(name, {}) for p in tensors])


def write_states(state: Any, entries: list[tuple[str, Sequence[Tensor], RoleState]]) -> None:
    """Write what is new in the states of all roles of a step: name, parameters and news of each.

    The list is emptied on the way, so that nothing old is held by what has been written.
    """
    while entries:
        name, tensors, news = entries.pop()
        if news.shared:
            shared = {key: value() if callable(value) else value for key, value in news.shared.items()}
            state[name] = {**state.get(name, {}), **shared}
        for p, own in zip(tensors, news.each, strict=False):
            if own:
                _put(state, p, name, own)
        deferred = dict(news.deferred)
        del news
        for key in list(deferred):
            for p, value in zip(tensors, deferred.pop(key)(), strict=True):
                _put(state, p, name, {key: value})


def _put(state: Any, p: Tensor, name: str, own: Mapping[str, Any]) -> None:
    known = state.get(p, {})
    state[p] = {**known, name: {**known.get(name, {}), **own}}


def advanced(before: RoleState, news: RoleState) -> RoleState:
    """Return the state with what is new in it, everything computed."""
    each = [{**own, **new} for own, new in zip(before.each, news.each or [{} for _ in before.each], strict=True)]
    for key, compute in news.deferred.items():
        for own, value in zip(each, compute(), strict=True):
            own[key] = value
    shared = {key: value() if callable(value) else value for key, value in news.shared.items()}
    return RoleState({**before.shared, **shared}, each)
