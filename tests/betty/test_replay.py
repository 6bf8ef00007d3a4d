"""A trial leaves no trace, and sees what Betty differentiated: the same batches, masks and buffers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from betty.engine import Engine
from torch import Tensor, nn

from adaptive_bilevel.hypergradient import Identity
from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_betty import SLS, SLSB, SPSB, BiSLS, BiSPS, OneStepBiSLS, SPSMax, bind
from tests.betty.problems import ANY, Level, Ridge, Variable, engine, sgd, state
from tests.optim.helpers import Net

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:BiSLS. for 20 steps")

SYMMETRIC = Identity(0.1)  # the slope is then <h, d>, also where the lower loss is not convex
LOW: dict[str, Any] = {
    "SLS": lambda lr: lambda p: SLS(p, lr, **ANY),
    "SLSB": lambda lr: lambda p: SLSB(p, lr, decay="constant", **ANY),
    "SPSB": lambda lr: lambda p: SPSB(p, lr, decay="constant", lower_bound=-1e30),
    "SPSMax": lambda lr: lambda p: SPSMax(p, lr, lower_bound=-1e30),
}
HIGH: dict[str, Any] = {
    "BiSLS": lambda lr: (
        lambda p: BiSLS(
            p, lr, lower_bound=None, momentum=False, solver=SYMMETRIC, curvature=math.inf, carry=False, **ANY
        )
    ),
    "paper": lambda lr: lambda p: OneStepBiSLS(p, lr, lower_bound=None, **ANY),
    "BiSPS": lambda lr: lambda p: BiSPS(p, lr, decay="constant", lower_bound=-1e30),
}


# ------------------------------------------------------------------------------------------ a trial leaves no trace


def nets(outer: Any, inner: Any, gas: int = 1, T: int = 1, scheduled: bool = False, kind: str = "darts") -> Any:
    """A classifier with batch norm and dropout below, the weights of its classes above."""
    draws = torch.Generator().manual_seed(3)
    data = [
        [(torch.randn(16, 6, generator=draws), torch.randint(3, (16,), generator=draws)) for _ in range(7)]
        for _ in range(2)
    ]
    torch.manual_seed(0)

    def lower(problem: Any, batch: Any) -> Tensor:
        x, target = batch
        losses = nn.functional.cross_entropy(problem.module(x), target, reduction="none")
        return (problem.outer().sigmoid()[target] * losses).mean()

    def upper(problem: Any, batch: Any) -> Tensor:
        x, target = batch
        loss = nn.functional.cross_entropy(problem.inner(x), target)
        return loss + 0.01 * problem.module().square().sum()

    top = Level("outer", upper, Variable(torch.zeros(3)), outer, data[1], retain_graph=True)
    low = Level("inner", lower, Net(), inner, data[0], type=kind, unroll_steps=T, gradient_accumulation=gas)
    if scheduled:
        low.configure_scheduler = lambda: torch.optim.lr_scheduler.StepLR(low.optimizer, 30, 0.5)
    return engine(low, top, steps=100 * gas)


@pytest.mark.parametrize(
    ("low", "high", "options"),
    [
        ("SLS", "BiSLS", {"gas": 4, "kind": "adaptive_cg"}),
        ("SLSB", "BiSPS", {"gas": 4}),
        ("SLS", "paper", {"gas": 4}),
        ("SPSB", "BiSLS", {"T": 5, "kind": "adaptive_cg"}),
        ("SPSMax", "BiSPS", {"T": 2}),
        ("SLS", "paper", {"T": 5, "scheduled": True, "kind": "neumann"}),
        ("SLSB", "BiSLS", {"gas": 4, "kind": "adaptive_cg", "dtype": torch.float32}),
    ],
)
def test_a_constant_policy_is_sgd_to_the_bit(low: str, high: str, options: dict[str, Any]) -> None:
    """100 steps with batch norm and dropout, although trials were made."""
    options = dict(options)
    torch.set_default_dtype(options.pop("dtype", torch.float64))
    stock = nets(sgd(0.1), sgd(0.05), **options)
    if options.get("kind") == "adaptive_cg":
        bind(stock, solver=SYMMETRIC)
    stock.run()
    expected = state(stock)
    made = bind(nets(HIGH[high](0.1), LOW[low](0.05), **options))
    made.run()
    assert state(made) == expected
    inner, outer = made.inner.optimizer, made.outer.optimizer
    assert inner.record.outcome in (Outcome.accepted, Outcome.at_bound)
    if low.startswith("SLS"):
        assert inner.evaluations.lower.values == 100
    if high != "BiSPS":
        assert outer.evaluations.upper.values == 100 // options.get("T", 1)
        assert (outer.evaluations.lower.jvps if high == "BiSLS" else outer.evaluations.lower.gradients) > 0
    assert made.inner.evaluations > stock.inner.evaluations or low.startswith("SPS")


def test_stock_optimizers_in_a_bound_engine_are_undisturbed() -> None:
    ends = []
    for bound in (bind, lambda stock: stock):
        made = bound(nets(sgd(0.1), sgd(0.05), gas=2))
        made.run()
        ends.append(state(made))
    assert ends[0] == ends[1]


def test_a_module_whose_output_depends_on_its_buffers_is_replayed_from_the_same_ones() -> None:
    """Spectral norm turns its vector in every forward; a trial of length nearly 0 must see the same loss."""
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4, bias=False))
    x = torch.randn(8, 4)
    low = Level("inner", lambda p, b: (p.module(x) - 1.0).square().mean(), module, lambda p: SLS(p, 1e-200, **ANY))
    made = bind(engine(low, steps=3))
    made.run()
    record = low.optimizer.record
    assert float(record.value) == low.losses[-1]


def validated(problem: Any, batch: Any) -> None:
    with torch.no_grad():
        problem.get_loss(batch)


@pytest.mark.parametrize("who", ["engine", "upper loss", "grad_callback"])
def test_only_what_betty_differentiates_is_replayed(who: str) -> None:
    """A get_loss of the user, between or within steps, is no part of the step, nor of the lower level's next one."""
    toy, ends = Ridge(), []
    other = (toy.Av, toy.bv)
    for asked in (False, True):
        top, low = toy.levels(BiSLS, SLS, T=2, type="adaptive_cg", gradient_accumulation=4)

        class Validating(Engine):
            def validation(self, low: Level = low) -> None:
                validated(low, other)

        if asked and who == "upper loss":

            def loss(problem: Any, batch: Any) -> Tensor:
                validated(problem.inner, other)
                return toy.upper_loss(problem, batch)

            top._loss = loss
        if asked and who == "grad_callback":
            low.grad_callback = lambda low=low: validated(low, other)
        kind = Validating if asked and who == "engine" else Engine
        bind(engine(low, top, steps=80, kind=kind, valid_step=3)).run()
        ends.append((top.value, low.value))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_last_evaluation_is_what_a_callback_sees() -> None:
    seen: list[bool] = []

    def loss(problem: Any, batch: Any) -> Tensor:
        seen.append(problem.in_trial)
        value: Tensor = problem.module().square().sum()
        return value

    low = Level("inner", loss, Variable(torch.ones(2)), lambda p: SLS(p, 100.0))
    made = bind(engine(low, steps=1))
    assert low.in_trial is False
    made.run()
    assert seen[0] is False
    assert len(seen) > 2
    assert all(seen[1:])
    assert low.in_trial is False
