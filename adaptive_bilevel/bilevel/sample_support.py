"""How much of x a sample knows, and what that says of a tangent.

In data cleaning x has an entry for each training sample, and a minibatch's hypergradient is zero in all others. The
batch's lower problem consists of its own samples only, so its y answers to their entries as if there were no others:
1/share times as far as the solution of the whole problem does, share being the batch's part of the entries. What the
tangent ignores grows with the square of how far y goes, so relative to the answer it is share times as large for the
whole problem as it looks on the batch. The test of the tangent (`adaptive_bilevel.bilevel.model_check`) allows that
much more; the test of decrease stays as it is.

share = entries in which h is not zero / entries in which it was not zero lately. "Lately" is at least as long as it
took to see all of them: once nothing new has come for as long as that, counting starts anew, and the last count stands
until the new one exceeds it. So what was not zero once only, or is not any more (units of a network that have died), is
forgotten. Where every sample depends on all of x, share is 1.

Measured (``examples/benchmarks/NOTES.md``): hyper-cleaning on batches of 128 out of 1,000, validation loss, BiSLS-SGD
.695 -> .598, BiSLS-Adam .629 -> .550.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.reductions import on_host

__all__ = ["Coverage", "coverage"]


class Coverage(NamedTuple):
    """What of x a hypergradient covers.

    Attributes:
        share: Its part of the entries that hypergradients cover, in (0, 1].
        commit: Takes the entries into the state; not called for a step that must leave no trace.
    """

    share: float
    commit: Callable[[], None]


def coverage(parameters: Sequence[Tensor], grads: Sequence[Tensor | None], state: Any) -> Coverage:
    """Return what the hypergradient covers.

    Args:
        parameters: The parameters that a step may move.
        grads: Their hypergradients; None: not in the sample.
        state: An optimizer's state. Under "coverage" it holds "mask" (the entries covered since counting began, all
            parameters in a row), "age" (steps since then), "grown" (its age when the last new entry came), and
            "before" (the number of entries covered before).
    """
    device = parameters[0].device if parameters else torch.device("cpu")

    def now() -> Tensor:  # made twice, rather than kept while the step is searched
        rows = [
            (torch.zeros_like(p, dtype=torch.bool) if g is None else g != 0).reshape(-1).to(device)
            for p, g in zip(parameters, grads, strict=True)
        ]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.bool)

    saved: dict[str, Any] = state.get("coverage") or {}
    if "mask" not in saved or saved["mask"].numel() != sum(p.numel() for p in parameters):
        # The first step, or other parameters move than before.
        saved = {"mask": torch.zeros_like(now()), "age": 0, "grown": 0, "before": 0.0}
    mask = saved["mask"].to(device)
    here, known, covered = on_host(now().count_nonzero(), mask.count_nonzero(), (now() | mask).count_nonzero())
    age = saved["age"] + 1
    grown = age if covered > known else saved["grown"]

    def commit() -> None:
        if age > 2 * grown:
            state["coverage"] = {"mask": now(), "age": 1, "grown": 1, "before": covered}
        else:
            state["coverage"] = {"mask": now() | mask, "age": age, "grown": grown, "before": saved["before"]}

    return Coverage(min(here / max(covered, saved["before"]), 1.0) if here > 0.0 else 1.0, commit)
