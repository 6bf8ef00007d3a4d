"""What a saved state looks like: entries of parameters by number only, as tools of torch expect them.

``torch.distributed.checkpoint`` renames the entries of ``state_dict()["state"]`` from numbers to names of parameters.
So what belongs to no parameter (the rule's state, that of roles) is saved in the first group, and each parameter has an
entry, be it empty.
"""

from __future__ import annotations

from typing import Any

__all__ = ["packed", "unpacked"]

_SHARED = "shared_state"


def packed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state as torch makes it, in the form in which it is saved."""
    groups = [dict(group) for group in saved["param_groups"]]
    numbers = [number for group in groups for number in group["params"]]
    state = {number: saved["state"].get(number, {}) for number in numbers}
    groups[0][_SHARED] = {name: value for name, value in saved["state"].items() if isinstance(name, str)}
    return {**saved, "state": state, "param_groups": groups}


def unpacked(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state, whose parameters may have names, as torch loads it."""
    groups = [dict(group) for group in saved["param_groups"]]
    shared: dict[str, Any] = next((group.pop(_SHARED) for group in groups if _SHARED in group), {})
    state = {name: value for name, value in saved["state"].items() if value}
    return {**saved, "state": {**state, **shared}, "param_groups": groups}
