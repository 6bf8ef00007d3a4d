"""A checkpoint of parameters and optimizers in parts, of four processes, goes on in two."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit
from tests.bilevel.test_fully_sharded import Problem
from tests.processes import results_of

HALF, STEPS = 2, 4


class Training:
    """BiSLS Adam above SLS Adam, over some shares of the data."""

    def __init__(self, shares: list[int]) -> None:
        self.problem = problem = Problem(shares, "both")
        self.inner = SLS(problem.y, direction="adam")
        self.outer = BiSLS(problem.x, lower=self.inner, solver=Lanczos(3), direction="adam")
        self.levels = {"upper": (problem.outer, self.outer), "lower": (problem.inner, self.inner)}

    def run(self, iterations: Iterable[int]) -> list[Any]:
        p = self.problem
        for k in iterations:
            self.inner.step(partial(p.lower, k))
            upper, lower = partial(p.upper, k), partial(p.lower, k)
            assign(p.x, implicit(upper, lower, p.x, p.y, Lanczos(3)))
            self.outer.step(upper)
        return [t.tolist() for t in p.tensors]

    def state(self) -> dict[str, Any]:
        models = {name: get_model_state_dict(model) for name, (model, _) in self.levels.items()}
        optimizers = {name: get_optimizer_state_dict(model, own) for name, (model, own) in self.levels.items()}
        return {"models": models, "optimizers": optimizers}

    def load(self, saved: dict[str, Any]) -> None:
        whole = StateDictOptions(full_state_dict=True)
        for name, (model, optimizer) in self.levels.items():
            set_model_state_dict(model, saved["models"][name], options=whole)
            set_optimizer_state_dict(model, optimizer, optim_state_dict=saved["optimizers"][name])


def four(folder: str, rank: int) -> Any:
    training = Training([rank])
    training.run(range(HALF))
    dcp.save(training.state(), checkpoint_id=folder)
    return training.run(range(HALF, STEPS))


def two(folder: str, rank: int) -> Any:
    training, file = Training([2 * rank, 2 * rank + 1]), Path(folder) / "whole.pt"
    if rank == 0:
        dcp_to_torch_save(folder, file)
    distributed.barrier()
    training.load(torch.load(file, weights_only=True))
    return training.run(range(HALF, STEPS))


def test_a_checkpoint_in_parts_goes_on_in_other_processes(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    of_four, of_two = results_of(partial(four, folder), 4), results_of(partial(two, folder), 2)
    assert of_two[0] == of_two[1]
    for one, other in zip(of_four[0], of_two[0], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0.0, atol=1e-8)
