"""Two processes with different data take the same steps, and their parameters stay bit-equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn

from adaptive_bilevel import SLS, SLSB, SPSB
from tests.optim.helpers import INFOS, batches, closure_of, net, plain
from tests.processes import results_of

CHOSEN = [info for info in INFOS if info.cls in (SPSB, SLS, SLSB)]


def work(rank: int) -> Any:
    found = {}
    for info in CHOSEN:
        for form in ("closure", "backward", "two samples", "poison"):
            torch.manual_seed(rank)
            module = net(dropout=0.3)
            model = nn.parallel.DistributedDataParallel(module)
            optimizer = info.make(module.parameters(), None if form == "closure" else 10.0)
            steps = []
            data = batches(3, seed=10 + rank)
            for k, batch in enumerate(data):
                evaluate = closure_of(model, batch)

                def closure(evaluate: Any = evaluate, k: int = k) -> Any:
                    loss = evaluate()
                    if form == "backward":
                        loss.backward()
                        return loss.item()
                    return loss * float("nan") if form == "poison" and k == 1 and rank == 1 else loss

                if form == "two samples":
                    optimizer.step(closure, step_closure=closure_of(model, data[k - 1]))
                else:
                    optimizer.step(closure)
                steps.append((optimizer.record.step_size, int(optimizer.record.outcome), optimizer.record.trials))
            found[info.name, form] = (
                steps,
                plain(dict(module.named_parameters())),
                plain(optimizer.state_dict()["state"]),
            )
    return found


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_agree() -> None:
    one, two = results_of(work)
    assert len(one) == 4 * len(CHOSEN)
    for key, value in one.items():
        assert value == two[key], key
        steps = value[0]
        assert sum(step > 0 for step, _, _ in steps) >= 2, (key, steps)
