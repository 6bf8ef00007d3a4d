"""How much memory tensors hold, from torch's own record of every allocation and release.

So a figure is exact and repeatable: no allocator's cache is in it and no page of the interpreter's, but all that
autograd keeps where Python cannot see it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def live_bytes(action: Callable[[], Any]) -> list[int]:
    """What all tensors on the CPU held together, beyond what they held before, after each allocation and release.

    Releases of what was there before are not seen, so `action` should only release what it has made.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total, totals = 0, [0]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        totals.append(total)
    return totals
