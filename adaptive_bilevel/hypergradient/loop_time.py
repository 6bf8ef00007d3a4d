"""How long the lower loop lasts: the sum of its step sizes, for loops of gradient descent that an upper step follows.

The time belongs to the lower tensors and is kept under the first of them, weakly, as a basis is (see
``shared_basis``). Only an upper optimizer whose lower optimizer is `torch.optim.SGD` has it watched. The searches of
this package take steps of at least the order of 1 / L, so that their loops are no limit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["LoopTime", "last_limit", "loop_time", "stability_limit", "watch"]


@final
class LoopTime:
    """The sum of the step sizes of a lower loop. A loop ends when it was asked for and another step follows.

    Attributes:
        limit: `stability_limit` of the last step.
    """

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._asked = False
        self.limit: Any = math.inf

    def step(self, size: float | Tensor, limit: float | Tensor = math.inf) -> None:
        """Take a step."""
        self.limit = limit
        self._sum = size if self._asked else self._sum + size
        self._asked = False

    def ask(self) -> float:
        """Return the time of the loop; infinite before any step."""
        self._asked = True
        return float(self._sum) or math.inf


_times: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, LoopTime] = weakref.WeakKeyDictionary()


def watch(optimizer: torch.optim.Optimizer, lower: Sequence[Tensor]) -> None:
    """Let the steps of gradient descent count for these lower tensors.

    The size of a step is ``lr (1 - dampening) / (1 - momentum)``, the largest of the groups.

    >>> y = torch.tensor([1.0], requires_grad=True)
    >>> sgd = torch.optim.SGD([y], lr=0.5)
    >>> watch(sgd, [y])
    >>> for _ in range(3): sgd.step()
    >>> loop_time([y])
    1.5
    """
    if not isinstance(optimizer, torch.optim.SGD) or not lower:
        return
    if optimizer not in _watched:
        time = _watched[optimizer] = LoopTime()

        def count(sgd: torch.optim.Optimizer, args: object, options: object) -> None:
            time.step(max(map(_size, sgd.param_groups)), stability_limit(sgd))

        optimizer.register_step_post_hook(count)
    _times[lower[0]] = _watched[optimizer]


def loop_time(lower: Sequence[Tensor]) -> float:
    """Return how long the last lower loop lasted; infinite if that is not known."""
    time: LoopTime | None = _times.get(lower[0]) if lower else None
    return math.inf if time is None else time.ask()


def last_limit(lower: Sequence[Tensor]) -> float:
    """Return `stability_limit` of the last lower step; infinite if that is not known."""
    time: LoopTime | None = _times.get(lower[0]) if lower else None
    return math.inf if time is None else float(time.limit)


def stability_limit(optimizer: torch.optim.Optimizer) -> Any:
    """Return the largest curvature at which steps of `torch.optim.SGD` do not diverge, 2 (1 + momentum) / lr.

    >>> stability_limit(torch.optim.SGD([torch.ones(1)], lr=0.5, momentum=0.5))
    6.0
    """
    found = [2.0 * (1.0 + g["momentum"]) / g["lr"] if g["lr"] > 0.0 else math.inf for g in optimizer.param_groups]
    return min(found)


def _size(group: dict[str, Any]) -> Any:
    momentum = group["momentum"]
    return group["lr"] * (1.0 - group["dampening"] if momentum else 1.0) / (1.0 - momentum)
