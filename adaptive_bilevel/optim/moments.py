"""Moving means of gradients and of their squares, as Adam keeps them.

They are in at least float32: squares of gradients leave the range of float16, and a mean over 1,000 gradients needs
more digits than bfloat16 has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation import foreach
from ..evaluation.vectors import widen
from .state import RoleState

__all__ = ["Moment", "mean", "mean_square"]


class Moment(NamedTuple):
    """A moving mean: of the gradients (Adam's first moment m), or of their squares (the second, v).

    Attributes:
        moment: Computes it. Whoever needs it again computes it again, since kept it would be a copy.
        mass: 1 - beta^n of each parameter, by which it is to be divided.
        commit: Returns what is new in the state with these gradients in it; see `Direction.commit`.
    """

    moment: Callable[[], list[Tensor]]
    mass: list[Any]
    commit: Callable[..., RoleState]


def mean(
    gradients: Sequence[Tensor], each: Sequence[Mapping[str, Any]], beta: float, *, restart: bool = False
) -> Moment:
    """Return the moving mean with these gradients in it, or of these alone.

    Args:
        gradients: The gradients.
        each: State of each parameter; it holds "averaged" (n) and "exp_avg" (m).
        beta: Decay, in [0, 1).
        restart: Forget all gradients before.
    """
    known: Sequence[Mapping[str, Any]] = [{} for _ in each] if restart else each

    def advance(old: list[Tensor]) -> list[Tensor]:
        return foreach.lerp(old, widen(gradients), 1.0 - beta)

    return _moment(("averaged", "exp_avg"), gradients, known, beta, advance)


def mean_square(gradients: Sequence[Tensor], each: Sequence[Mapping[str, Any]], beta: float) -> Moment:
    """Return the moving mean of squares; the state holds "step" (n) and "exp_avg_sq" (v)."""

    def advance(old: list[Tensor]) -> list[Tensor]:
        second, new = foreach.mul(old, beta), widen(gradients)
        foreach.addcmul_(second, new, new, 1.0 - beta)
        return second

    return _moment(("step", "exp_avg_sq"), gradients, each, beta, advance)


def _moment(
    names: tuple[str, str],
    gradients: Sequence[Tensor],
    each: Sequence[Mapping[str, Any]],
    beta: float,
    advance: Callable[[list[Tensor]], list[Tensor]],
) -> Moment:
    counts, known = _counts(each, names[0], gradients), [saved.get(names[1]) for saved in each]

    def old() -> list[Tensor]:
        pairs = zip(known, widen(gradients), strict=True)
        return [torch.zeros_like(g) if m is None else m.to(g.dtype) for m, g in pairs]

    def commit(moved: Tensor | bool = True) -> RoleState:
        counted = _where(moved, counts, [n - 1 for n in counts])
        return RoleState(
            each=[{names[0]: n} for n in counted],
            deferred={names[1]: lambda: _where(moved, advance(old()), old())},
        )

    return Moment(lambda: advance(old()), [1.0 - beta**n for n in counts], commit)


def _counts(each: Sequence[Mapping[str, Any]], name: str, gradients: Sequence[Tensor]) -> list[Any]:
    """Return how many gradients each parameter has seen, these included."""
    counts = [saved.get(name, 0) + 1 for saved in each]
    if any(isinstance(n, Tensor) for n in counts):  # counted on the device, and perhaps a parameter that came later
        counts = [torch.as_tensor(n, device=g.device) for n, g in zip(counts, gradients, strict=True)]
    return counts


def _where(moved: Tensor | bool, new: list[Any], old: list[Any]) -> list[Any]:
    """Return the new values; where a step on the device did not move, the old ones."""
    if not isinstance(moved, Tensor):
        return new
    return [torch.where(moved, ahead, before) for ahead, before in zip(new, old, strict=True)]
