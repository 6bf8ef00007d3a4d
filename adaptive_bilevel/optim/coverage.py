"""How much of x a sample knows, and how y therefore answers to a move of it.

In data cleaning x has an entry for each training sample, and a minibatch's hypergradient is zero in all others. The
batch's lower problem consists of its own samples only, so its y answers to their entries as if there were no others:
1/share times as much as the solution of the whole problem does, share being the batch's part of the entries. A step
that the batch certifies is too short for the whole by the same factor, and each entry is moved once an epoch only.

So the searched function has y answer by less, phi(a) = f(x - a d, y + sqrt(share) a w), with

    share = entries in which h is not zero / entries in which any h so far was not zero,

which is 1, and changes nothing, where every sample depends on all of x. The root is measured, not derived: the whole
answer is that of a problem that ends with this batch, share times it what the other samples leave of it where
hypergradients are exact. Their noise grows with the step, and how much of it a direction takes differs (Adam's takes
much). Hyper-cleaning on batches of 128 out of 1,000, 8 seeds, with the powers 0, 1/2, 1: BiSLS-SGD .695, .564, .539,
BiSLS-Adam .629, .572, .622 (``examples/benchmarks/NOTES.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .scalars import on_host

__all__ = ["Coverage", "coverage"]


class Coverage(NamedTuple):
    """What of x a hypergradient covers.

    Attributes:
        answer: sqrt(share), how much of its tangent y is moved by, in (0, 1].
        commit: Takes the entries into the state; not called for a step that must leave no trace.
    """

    answer: float
    commit: Callable[[], None]


def coverage(parameters: Sequence[Tensor], grads: Sequence[Tensor], state: Any) -> Coverage:
    """Return what the hypergradient covers.

    Args:
        parameters: The parameters that have a gradient, keys of `state`.
        grads: Their hypergradients.
        state: An optimizer's state; per parameter it holds "covered", the entries in which a hypergradient was
            not zero.
    """
    known = {p: saved["covered"] for p, saved in state.items() if "covered" in saved}

    def ever() -> list[Tensor]:
        return [(g != 0) | known[p] if p in known else g != 0 for p, g in zip(parameters, grads, strict=True)]

    taking_part = set(parameters)
    absent = [mask for p, mask in known.items() if p not in taking_part and p.requires_grad]
    here, there = on_host(_entries([g != 0 for g in grads]), _entries([*ever(), *absent]))

    def commit() -> None:
        for p, entries in zip(parameters, ever(), strict=True):
            state[p] = {**state[p], "covered": entries}

    return Coverage(math.sqrt(here / there) if here else 1.0, commit)


def _entries(masks: Sequence[Tensor]) -> Tensor | float:
    """Return how many entries are true."""
    return torch.stack([mask.sum().to(masks[0].device) for mask in masks]).sum() if masks else 0.0
