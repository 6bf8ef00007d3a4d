"""Mixed precision and several processes, as far as a CPU can show them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from betty.engine import Engine
from torch import Tensor, distributed, nn

from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_betty import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, OneStepBiSLS, bind
from tests.betty.problems import OLD, Level, Ridge, Variable, engine, only_new, sgd
from tests.processes import results_of

# ------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:.*no trial step gave")
def test_every_evaluation_is_in_the_precision_of_the_problem() -> None:
    """Betty's autocast is in training_step_exec, and the user's in training_step: all evaluations go through both."""
    toy = Ridge()
    top, low = toy.levels(BiSLS, SLS, type="adaptive_cg")
    dtypes, executed = set(), {"outer": 0, "inner": 0}
    for level in (top, low):
        loss, level_name = level._loss, level.name

        def in_half(problem: Any, batch: Any, loss: Any = loss) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                product = torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)
                dtypes.add(product.dtype)
                value: Tensor = loss(problem, batch)
            return value

        level._loss = in_half
        execute = level.training_step_exec

        def counted(batch: Any, execute: Any = execute, name: str = level_name) -> Any:
            executed[name] += 1
            return execute(batch)

        level.training_step_exec = counted
    bind(engine(low, top, steps=50)).run()
    assert dtypes == {torch.bfloat16}
    assert executed == {"outer": top.evaluations, "inner": low.evaluations}
    assert low.evaluations > 100
    assert float(toy.F(top.value)) < float(toy.F(torch.zeros(toy.d)))


@only_new
@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:.*no trial step gave")
def test_bf16_of_the_config() -> None:
    toy = Ridge()
    top, low = toy.levels(BiSLS, SLS, precision="bf16")
    bind(engine(low, top, steps=50)).run()
    assert float(toy.F(top.value)) < float(toy.F(torch.zeros(toy.d)))


def with_scaler(level: Level, scale: float) -> Level:
    """As Betty sets up fp16, which it does on CUDA only."""
    level.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    if OLD:
        level._fp16 = True
    return level


@pytest.mark.parametrize("rule", [SLS, SLSB, SPSB, AutoSLS])
@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_scaler_changes_nothing(rule: Any, gas: int) -> None:
    """The gradient is unscaled when the step sees it, and so is the loss that it is compared with."""
    ends = []
    for scale in (None, 1024.0):
        top, low = Ridge().levels(BiSPS, rule, type="darts", gradient_accumulation=gas)
        made = engine(low, top, steps=20 * gas)
        if scale is not None:
            with_scaler(low, scale), with_scaler(top, scale)
        bind(made).run()
        ends.append((low.value.clone(), top.value.clone(), low.optimizer.record.step_size))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-6)
    assert torch.allclose(ends[0][1], ends[1][1], rtol=1e-4)  # darts perturbs by the norm of a scaled vector
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_scaler_that_skips_a_step() -> None:
    def loss(problem: Any, batch: Any) -> Tensor:
        value: Tensor = problem.module().square().sum()
        return value * math.inf if len(problem.losses) == 2 and not problem.in_trial else value

    low = Level("inner", loss, Variable(torch.ones(2)), lambda p: SLS(p, 0.01))
    made = engine(low, steps=2)
    with_scaler(low, 1024.0)
    bind(made).run()
    before, record = low.value.clone(), low.optimizer.record
    low.step()
    assert torch.equal(low.value, before)
    assert low.optimizer.record is record
    assert low.scaler.get_scale() == 512.0
    low.step()
    assert low.optimizer.record.outcome == Outcome.accepted
    assert not torch.equal(low.value, before)


# ------------------------------------------------------------------------------------------ several processes


class OnCpu(Engine):
    """Betty's strategy "distributed" wants CUDA; this is it on the CPU."""

    def configure_systems(self) -> Any:
        self._world_size, self._rank, self._local_rank = distributed.get_world_size(), distributed.get_rank(), 0
        self.device = "cpu"
        names = ("strategy", "backend", "world_size", "rank", "local_rank")
        return {name: getattr(self, f"_{name}") for name in names}

    def cleanup(self) -> None:
        """Leave the process group to the test."""


class Batched(Level):
    """Each process draws its own batches."""

    def get_batch(self) -> Any:
        return (torch.randn(4, 3, generator=self.draws),)

    def configure_train_data_loader(self) -> Any:
        return None


def remember(problem: Any, decisions: list[Any]) -> None:
    step = problem.optimizer.step

    def spy() -> None:
        step()
        record = problem.optimizer.record
        decisions.append((record.step_size, int(record.outcome), record.trials))

    problem.optimizer.step = spy


LEVELS = {
    "SLS": (SLS, BiSPS, "darts"),
    "SLSB": (SLSB, BiSPS, "darts"),
    "SPSB": (SPSB, BiSPS, "darts"),
    "AutoSLS": (AutoSLS, BiSPS, "darts"),
    "BiSLS": (SLS, BiSLS, "darts"),
    "BiSLS adaptive_cg": (SLS, BiSLS, "adaptive_cg"),
    "OneStepBiSLS": (SLS, OneStepBiSLS, "neumann"),
}


def work(rank: int) -> Any:
    found = {}
    for name, (below, above, kind) in LEVELS.items():
        torch.manual_seed(0)
        low = Batched(
            "inner",
            lambda p, b: (p.module(b[0]) - p.outer(b[0].sum(1, keepdim=True))).square().mean(),
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
            below,
            type=kind,
            unroll_steps=2,
        )
        top = Batched(
            "outer",
            lambda p, b: (p.inner(b[0]) - 1).square().mean(),
            nn.Linear(1, 1, bias=False),
            above,
            retain_graph=True,
        )
        low.draws, top.draws = (torch.Generator().manual_seed(10 * rank + i) for i in (1, 2))
        made = bind(engine(low, top, steps=6, kind=OnCpu, strategy="distributed", backend="gloo"))
        decisions: list[Any] = []
        for problem in (low, top):
            remember(problem, decisions)
        made.run()
        tensors = [p.tolist() for problem in (low, top) for p in problem.module.parameters()]
        found[name] = decisions, low.losses, tensors
    return found


@only_new
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_agree() -> None:
    """In every decision, and in their parameters, to the rounding of "darts", which adds and subtracts."""
    one, two = results_of(work)
    assert set(one) == set(LEVELS)
    for name, (decisions, losses, tensors) in one.items():
        assert len(decisions) == 6 + 3
        assert decisions == two[name][0], name
        for mine, theirs in zip(tensors, two[name][2], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0.0, atol=1e-12)
        assert losses != two[name][1], "the processes were to see different batches"
        assert sum(step > 0 for step, _, _ in decisions) >= 8, (name, decisions)


def test_stock_optimizers_keep_their_scaler() -> None:
    top, low = Ridge().levels(sgd(0.1), sgd(0.1))
    made = engine(low, top, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_scaler(low, 8.0)
        bind(made).run()
    assert low.losses[-1] < low.losses[0]
