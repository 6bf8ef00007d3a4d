"""Sample support: how much of x a sample depends on, and what that says of a tangent.

In data cleaning x has an entry for each training sample, and a minibatch's hypergradient is zero in all others. The
batch's lower problem consists of its own samples only, so its y answers to their entries as if there were no others:
1/share times as far as the solution of the whole problem does, share being the batch's part of the entries. What the
tangent ignores grows with the square of how far y goes, so relative to the answer it is share times as large for the
whole problem as it looks on the batch. The check of the model (`adaptive_bilevel.bilevel.model_check`) allows that much
more; the test of decrease stays as it is.

share = entries in which h is not zero / entries in which it was not zero lately. "Lately" is at least as long as it
took to see all of them: once nothing new has come for as long as that, counting starts anew, and the last count stands
until the new one exceeds it. So what was not zero once only, or is not any more (units of a network that have died), is
forgotten. Where every sample depends on all of x, share is 1.

Measured (``examples/benchmarks/NOTES.md``): hyper-cleaning on batches of 128 out of 1,000, validation loss, BiSLS-SGD
.695 -> .598, BiSLS-Adam .629 -> .550.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.parts import part, scattered, whole
from ..evaluation.reductions import on_host
from ..evaluation.vectors import stacked

__all__ = ["Support", "support"]

Entries = Sequence[tuple[Tensor, Tensor | None]]
"""The parameters that a step may move, each with its hypergradient (None: not in the sample)."""


class Support(NamedTuple):
    """What of x a hypergradient supports.

    Attributes:
        share: Its part of the entries that hypergradients support, in (0, 1].
        age: Steps since counting began, with this one.
        grown: The age when the last new entry came.
        total: Entries that hypergradients since then support.
        before: Entries that they supported before counting began.
    """

    share: float
    age: int
    grown: int
    total: float
    before: float

    def after(self, entries: Entries, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept after the step, see `support`; the mask as a function that computes it."""
        if self.age > 2 * self.grown:
            return {"mask": lambda: _support_of(entries), "age": 1, "grown": 1, "before": self.total}

        def mask() -> list[Tensor]:
            here = _support_of(entries)
            return _joined(here, _known(saved, here)["mask"])

        return {"mask": mask, "age": self.age, "grown": self.grown, "before": self.before}


def support(entries: Entries, saved: Mapping[str, Any]) -> Support:
    """Return what the hypergradient supports.

    Args:
        entries: Parameters and hypergradients.
        saved: What is kept: "mask" (the entries supported since counting began, for each parameter), "age" (steps
            since then), "grown" (its age when the last new entry came), and "before" (the number of entries supported
            before). Empty before the first step; of other parameters than these, it is not used.
    """
    here = _support_of(entries)
    known = _known(saved, here)
    size, before, both = on_host(*map(_count, (here, known["mask"], _joined(here, known["mask"]))))
    age = known["age"] + 1
    share = min(size / max(both, known["before"]), 1.0) if size > 0.0 else 1.0
    return Support(share, age, age if both > before else known["grown"], both, known["before"])


def _support_of(entries: Entries) -> list[Tensor]:
    """Return which entries are not zero; computed again after the search, rather than kept during it."""
    return [torch.zeros_like(p, dtype=torch.bool, requires_grad=False) if g is None else g != 0 for p, g in entries]


def _joined(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    return [a | b for a, b in zip(one, other, strict=True)]


def _count(masks: Sequence[Tensor]) -> Tensor:
    """Return the number of entries in masks."""
    counts = whole([part(mask).count_nonzero() for mask in masks], masks)
    return stacked(counts).sum() if counts else torch.zeros(())


def _known(saved: Mapping[str, Any], here: Sequence[Tensor]) -> Mapping[str, Any]:
    """Return what is kept, on the devices of the parameters; of a first step, where it is of other parameters."""
    if "mask" not in saved or [m.shape for m in saved["mask"]] != [m.shape for m in here]:
        return {"mask": [torch.zeros_like(m) for m in here], "age": 0, "grown": 0, "before": 0.0}
    return {**saved, "mask": [scattered(m.to(h.device), h) for m, h in zip(saved["mask"], here, strict=True)]}
