"""How long the lower loop lasts: the sum of its step sizes.

The time belongs to the lower tensors and is kept under the first of them, weakly, as a basis is (see
``shared_basis``), if an upper step follows them:

| the lower steps are those of | the time is |
|---|---|
| one `torch.optim.SGD` | counted |
| several, or code of the user's (``lower=(tensors, loss)``) | estimated, see ``observed_loop`` |
| this package | no limit: searches take steps of at least the order of 1 / L |
| Adam and other stock optimizers | no limit: their metric lengthens the steps where H is flat |
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .observed_loop import ObservedLoop

__all__ = [
    "LoopTime",
    "hand_on",
    "last_limit",
    "loop_time",
    "observe",
    "observed",
    "restore_loop",
    "saved_loop",
    "stability_limit",
    "watch",
]


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

    def ask(self, lower: Sequence[Tensor]) -> float:
        """Return the time of the loop; infinite before any step."""
        self._asked = True
        return float(self._sum) or math.inf


_times: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, LoopTime] = weakref.WeakKeyDictionary()


def watch(optimizer: torch.optim.SGD, lower: Sequence[Tensor]) -> None:
    """Let the steps of gradient descent count for these lower tensors.

    The size of a step is ``lr (1 - dampening) / (1 - momentum)``, the largest of the groups.

    >>> y = torch.tensor([1.0], requires_grad=True)
    >>> sgd = torch.optim.SGD([y], lr=0.5)
    >>> watch(sgd, [y])
    >>> for _ in range(3): sgd.step()
    >>> loop_time([y])
    1.5
    """
    if not lower:
        return
    if optimizer not in _watched:
        time = _watched[optimizer] = LoopTime()

        def count(sgd: torch.optim.Optimizer, args: object, options: object) -> None:
            time.step(max(map(_size, sgd.param_groups)), stability_limit(sgd))

        optimizer.register_step_post_hook(count)
    _times[lower[0]] = _watched[optimizer]


def observe(lower: Sequence[Tensor]) -> None:
    """Let the time of these lower tensors be estimated from now on."""
    if lower and observed(lower) is None:
        _times[lower[0]] = ObservedLoop()


def observed(lower: Sequence[Tensor]) -> ObservedLoop | None:
    """Return the loop whose time is estimated; None: it is not."""
    time = _times.get(lower[0]) if lower else None
    return time if isinstance(time, ObservedLoop) else None


def saved_loop(lower: Sequence[Tensor]) -> dict[str, Any]:
    """Return what is known of the time of an estimated loop, as numbers and tensors; {} of others."""
    loop = observed(lower)
    return {} if loop is None else loop.saved()


def restore_loop(lower: Sequence[Tensor], saved: Mapping[str, Any]) -> None:
    """Put what `saved_loop` returned in the place of what is known of an estimated loop."""
    if saved and lower and lower[0] not in _times:
        observe(lower)
    loop = observed(lower)
    if loop is not None:
        loop.restore(saved)


def hand_on(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Let lower tensors that were made anew have the loop of those before."""
    loop = observed(before)
    if loop is not None and after:
        _times[after[0]] = loop


def loop_time(lower: Sequence[Tensor]) -> float:
    """Return how long the last lower loop lasted; infinite if that is not known."""
    time: LoopTime | ObservedLoop | None = _times.get(lower[0]) if lower else None
    return math.inf if time is None else time.ask(lower)


def last_limit(lower: Sequence[Tensor]) -> float:
    """Return the largest curvature at which lower steps do not diverge; infinite if that is not known."""
    time: LoopTime | ObservedLoop | None = _times.get(lower[0]) if lower else None
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
