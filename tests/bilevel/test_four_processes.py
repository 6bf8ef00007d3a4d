"""Four processes: bit-equal to each other and equal to one; a checkpoint of theirs goes on in two."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit
from tests.bilevel.test_processes import Problem, below
from tests.processes import results_of

WORLD, HALF, STEPS = 4, 5, 10
SIZES = (8, 8, 8, 3)


class Training:
    """BiSLS Adam above SLS, over some shares of the data."""

    def __init__(self, shares: list[int]) -> None:
        self.problem = problem = Problem(shares, "plain", sizes=SIZES)
        self.inner = SLS(problem.y)
        self.outer = BiSLS(problem.x, lower=self.inner, solver=Lanczos(4), direction="adam")

    def run(self, iterations: Iterable[int]) -> list[Tensor]:
        p = self.problem
        for k in iterations:
            for j in range(2):
                self.inner.step(partial(p.lower, 2 * k + j))
            upper, lower = partial(p.upper, k), partial(p.lower, 2 * k + 1)
            assign(p.x, implicit(upper, lower, p.x, p.y, Lanczos(4)))
            self.outer.step(upper)
        return p.tensors

    def state(self) -> dict[str, Any]:
        p = self.problem
        return {
            "x": p.outer.state_dict(),
            "y": p.inner.state_dict(),
            "upper": get_optimizer_state_dict(p.outer, self.outer),
            "lower": get_optimizer_state_dict(p.inner, self.inner),
        }

    def load(self, saved: dict[str, Any]) -> None:
        p = self.problem
        p.outer.load_state_dict(saved["x"])
        p.inner.load_state_dict(saved["y"])
        set_optimizer_state_dict(p.outer, self.outer, optim_state_dict=saved["upper"])
        set_optimizer_state_dict(p.inner, self.inner, optim_state_dict=saved["lower"])


def four(folder: str, rank: int) -> Any:
    training = Training([rank])
    training.run(range(HALF))
    dcp.save(training.state(), checkpoint_id=folder)
    ends = training.run(range(HALF, STEPS))
    return [t.tolist() for t in (*ends, *below(SLS, sizes=SIZES)([rank], "plain"))]


def two(folder: str, rank: int) -> Any:
    shares = [2 * rank, 2 * rank + 1]
    training, file = Training(shares), Path(folder) / "whole.pt"
    template = training.state()
    dcp.load(template, checkpoint_id=folder)
    with pytest.raises(OptionError, match="dcp_to_torch_save"):
        training.load(template)
    if rank == 0:
        dcp_to_torch_save(folder, file)
    distributed.barrier()
    training = Training(shares)
    training.load(torch.load(file, weights_only=True))
    return [t.tolist() for t in training.run(range(HALF, STEPS))]


def test_four_processes_are_one_and_their_checkpoint_goes_on_in_two(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    of_four = results_of(partial(four, folder), WORLD)
    assert all(found == of_four[0] for found in of_four)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = list(range(WORLD))
        upper, lower = Training(shares).run(range(STEPS)), below(SLS, sizes=SIZES)(shares, "plain")
    of_two = results_of(partial(two, folder), 2)
    assert of_two[0] == of_two[1]
    for found, expected in ((of_four[0], [*upper, *lower]), (of_two[0], upper)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one), other, rtol=0.0, atol=1e-8)
