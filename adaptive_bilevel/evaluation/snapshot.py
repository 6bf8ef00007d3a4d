"""Random state and buffers at one time, to be put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .buffers import Buffers

__all__ = ["RandomState", "Snapshot"]


class RandomState:
    """The default random generators of the CPU and of some devices, at the time of construction."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Put the generators back to that time."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


class Snapshot:
    """Random state and the buffers of some modules, at the time of construction; for code around whole steps.

    Args:
        modules: The modules.
        devices: Other devices than the CPU whose random state counts.
    """

    def __init__(self, modules: Sequence[nn.Module], devices: Sequence[torch.device]) -> None:
        self._modules, self._random, self._buffers = modules, RandomState(devices), Buffers(modules)

    def restore(self) -> None:
        """Put buffers and generators back to that time."""
        if self._buffers.slots:
            with torch.no_grad():
                self._buffers.to_before(self._modules)
        self._random.restore()
