"""What a saved state looks like: entries of parameters by number only, as tools of torch expect them.

``torch.distributed.checkpoint`` renames the entries of ``state_dict()["state"]`` from numbers to names of parameters.
So what belongs to no parameter (the rule's state, that of roles) is saved in the first group, and each parameter has an
entry. Checkpoint files keep no empty entries. Once steps were taken, an empty entry therefore holds a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..evaluation.parts import in_parts, scattered
from ..evaluation.vectors import SHORT

__all__ = ["fit", "packed", "unpacked"]

_SHARED, _EMPTY = "shared_state", "empty"


def packed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state as torch makes it, in the form in which it is saved."""
    groups = [dict(group) for group in saved["param_groups"]]
    numbers = [number for group in groups for number in group["params"]]
    shared = {name: value for name, value in saved["state"].items() if isinstance(name, str)}
    empty = {_EMPTY: 0} if shared else {}
    state = {number: saved["state"].get(number, empty) for number in numbers}
    groups[0][_SHARED] = shared
    return {**saved, "state": state, "param_groups": groups}


def unpacked(saved: dict[str, Any], owner: str) -> dict[str, Any]:
    """Return a saved state, whose parameters may have names, as torch loads it.

    Raises:
        OptionError: A part of it is missing.
    """
    groups = [dict(group) for group in saved["param_groups"]]
    holds_shared = any(_SHARED in group for group in groups)
    shared: dict[str, Any] = next((group.pop(_SHARED) for group in groups if _SHARED in group), {})
    state = {name: value for name, value in saved["state"].items() if value and _EMPTY not in value}
    if holds_shared and "policy" not in shared and any(float(group.get("step_size", 0.0)) > 0.0 for group in groups):
        raise OptionError(
            f"{owner}.load_state_dict: the saved optimizer has taken steps, and their state is missing. "
            "torch.distributed.checkpoint.load fills in only what the new optimizer has already, which is nothing: "
            "read the checkpoint whole, by torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    return {**saved, "state": {**state, **shared}, "param_groups": groups}


def fit(state: Any, params: Sequence[Tensor], saved: Mapping[str, Any]) -> None:
    """Put loaded tensors into the dtype in which they were saved, and in parts where their parameter is.

    Torch casts to the dtype of the parameter, and means are kept in float32. A checkpoint that was read whole, for
    another number of processes say, has whole tensors.

    Args:
        state: The optimizer's, loaded.
        params: Its parameters.
        saved: What was loaded, from `unpacked`.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for p, number in zip(params, numbers, strict=True):
        if p.dtype in SHORT and number in saved["state"]:
            state[p] = _widened(state[p], saved["state"][number])
        if in_parts(p) and p in state:
            state[p] = _in_parts(state[p], p)


def _in_parts(loaded: Any, like: Tensor) -> Any:
    if isinstance(loaded, dict):
        return {name: _in_parts(value, like) for name, value in loaded.items()}
    return scattered(loaded, like) if isinstance(loaded, Tensor) and loaded.shape == like.shape else loaded


def _widened(loaded: Any, saved: Any) -> Any:
    if isinstance(loaded, dict):
        return {name: _widened(value, saved[name]) for name, value in loaded.items()}
    if isinstance(saved, Tensor) and saved.dtype == torch.float32:
        return saved.to(loaded.device, copy=True)
    return loaded
