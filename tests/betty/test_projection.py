"""A param_callback that is a projection is applied in trials, too; any other belongs to the step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_betty import SLS, SLSB, SPSB, BiSLS, SPSMax, bind
from tests.betty.problems import ANY, Level, Ridge, Variable, engine, sgd

# At a minimum, rounding errors have the last word.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no trial step gave", "ignore:.*slope is negative", "ignore:BiSLS. for 20 steps"
)


@pytest.mark.parametrize(("cls", "lr"), [(SLS, 100.0), (SLSB, 100.0), (SPSMax, None), (SPSB, None)])
def test_trials_are_projected(cls: Any, lr: float | None) -> None:
    """f is a loss outside of which there is nothing: a trial off the half line raises."""

    def loss(problem: Any, batch: Any) -> Tensor:
        y = problem.module()
        assert bool((y >= 0.5).all()), "left the set"
        value: Tensor = (y - torch.tensor([0.0, 2.0])).square().sum()
        return value

    low = Level("inner", loss, Variable(torch.tensor([1.5, 1.0])), lambda p: cls(p, lr))

    def clamp(params: Any = None) -> None:
        for p in low.trainable_parameters() if params is None else params:
            p.data.clamp_(min=0.5)

    low.param_callback = clamp
    made = bind(engine(low, steps=30))
    made.run()
    assert low.optimizer.evaluations.lower.values > 0
    assert torch.allclose(low.value, torch.tensor([0.5, 2.0]), atol=1e-3)
    assert low.optimizer.record.outcome in (Outcome.accepted, Outcome.zero_gradient, Outcome.search_failed)


@pytest.mark.parametrize("cls", [SPSB, SLS, SLSB])
def test_a_callback_that_fails_in_a_trial_leaves_all_as_it_was(cls: Any) -> None:
    start, trials = torch.tensor([1.5, 1.0]), 0
    while True:
        low = Level("inner", lambda p, b: (p.module() - 2.0).square().sum(), Variable(start), cls)
        left = trials

        def clamp(params: Any = None, low: Level = low) -> None:
            nonlocal left
            left -= low.in_trial
            if left < 0 and low.in_trial:
                raise KeyboardInterrupt
            for p in low.trainable_parameters():
                p.data.clamp_(min=0.5)

        low.param_callback = clamp
        made = bind(engine(low))
        try:
            made.run()
        except KeyboardInterrupt:
            assert torch.equal(low.value, start), trials
            trials += 1
            continue
        break
    assert trials > 6


def test_upper_trials_are_projected() -> None:
    toy = Ridge()

    def upper(problem: Any, batch: Any) -> Tensor:
        assert bool((problem.module() >= -0.5).all()), "left the set"
        return toy.upper_loss(problem, batch)

    top, low = toy.levels(BiSLS, SLS, type="adaptive_cg")
    top._loss = upper

    def clamp(params: Any = None) -> None:
        for p in top.trainable_parameters() if params is None else params:
            p.data.clamp_(min=-0.5)

    top.param_callback = clamp
    bind(engine(low, top, steps=200)).run()
    assert float(top.value.min()) == -0.5
    assert float(toy.F(top.value)) < float(toy.F(torch.zeros(toy.d)))


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_callback_that_is_no_projection_belongs_to_the_step(start: float) -> None:
    """A decay is applied once a step, by Betty, and not in trials; also where it does nothing at the start."""
    ends = []
    for optimizer in (sgd(0.1), lambda p: SLS(p, 0.1, **ANY)):
        low = Level("inner", lambda p, b: (p.module() - 2).square().sum(), Variable(torch.full((2,), start)), optimizer)

        def decay(params: Any = None, low: Any = low) -> None:
            for p in low.trainable_parameters():
                p.data.mul_(0.9)

        low.param_callback = decay
        bind(engine(low, steps=5)).run()
        ends.append(low.value.clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_that_rounds(dtype: torch.dtype) -> None:
    """Applied twice, a normalization may differ by a rounding error from one applied once."""
    torch.set_default_dtype(dtype)
    for seed in range(20):
        torch.manual_seed(seed)

        def loss(problem: Any, batch: Any) -> Tensor:
            y: Tensor = problem.module()
            assert float(y.detach().sum()) == pytest.approx(1.0, rel=1e-5), "left the set"
            return (y - 1.0).square().sum()

        low = Level("inner", loss, Variable(torch.rand(7).softmax(0)), SLS)

        def normalize(params: Any = None, low: Level = low) -> None:
            for p in low.trainable_parameters():
                p.data.clamp_(min=1e-3).div_(p.data.sum())

        low.param_callback = normalize
        bind(engine(low, steps=3)).run()


def test_copies_know_no_projection() -> None:
    """It belongs to the problem, which a copy of the optimizer is not of."""
    top, low = Ridge().levels(BiSLS, SLS)
    top.param_callback = lambda params=None: top.module.value.data.clamp_(min=-0.5)
    bind(engine(low, top, steps=20)).run()
    assert pickle.loads(pickle.dumps(top.optimizer)).project is None
    assert copy.deepcopy(top.optimizer).project is None


@pytest.mark.parametrize("carry", ["auto", True])
@pytest.mark.parametrize("lower", [SLS, lambda params: SPSMax(params, lr=1.0)], ids=["SLS", "SPSMax"])
def test_a_prediction_stays_in_the_set_of_the_lower_problem(lower: Any, carry: Any) -> None:
    """y_0 is on its bound, where the tangent leads out of the box."""
    aim, weight = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])
    curvature = torch.tensor([1.0, 0.5])
    top = Level(
        "outer",
        lambda p, b: (weight * (p.inner() - aim).square()).sum(),
        Variable(torch.zeros(2)),
        lambda params: BiSLS(params, carry=carry),
        type="adaptive_cg",
    )
    low = Level(
        "inner",
        lambda p, b: (curvature * (p.module() - p.outer()).square()).sum(),
        Variable(torch.zeros(2)),
        lower,
        unroll_steps=1,
    )
    low.param_callback = lambda *given: low.module.value.data[:1].clamp_(max=0.5)
    made = bind(engine(low, top, steps=60))
    seen, outcomes = [], []
    step = low.optimizer.step

    def spy() -> Any:
        seen.append(float(low.value[0]))
        step()
        outcomes.append(low.optimizer.record.outcome)

    low.optimizer.step = spy
    made.run()
    assert max(seen) <= 0.5
    assert Outcome.no_descent not in outcomes
    assert float(top.value[1]) == pytest.approx(1.0, abs=0.05)


def test_a_callback_that_writes_to_another_problem_is_no_projection() -> None:
    """Like a cold start in on_inner_loop_start; the probe leaves no trace at the other problem either."""
    losses = []
    for hook in ("param_callback", "on_inner_loop_start"):
        top, low = Ridge().levels(BiSLS, SLS, T=20)

        def restart(*given: Any, low: Any = low) -> None:
            for p in low.module.parameters():
                p.data.zero_()

        setattr(top if hook == "param_callback" else low, hook, restart)
        bind(engine(low, top, steps=200)).run()
        losses.append(top.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_groups_of_different_rates_are_projected_alike(rate: float) -> None:
    aim = torch.tensor([2.0, -2.0, 0.3])
    net = torch.nn.ParameterList([torch.zeros(3), torch.zeros(3)])

    def loss(problem: Any, batch: Any) -> Tensor:
        a, b = problem.module
        found: Tensor = (a - aim).square().sum() + (b + aim).square().sum() + (a * b).sum() ** 2
        return found

    groups: Any = [{"params": [net[0]]}, {"params": [net[1]], "lr": rate}]
    low: Any = Level("one", loss, net, lambda params: SLS(groups, 1.0))
    low.param_groups = lambda: [{"params": [low.module[0]]}, {"params": [low.module[1]], "lr": rate}]

    def clamp(*given: Any) -> None:
        for p in low.module.parameters():
            p.data.clamp_(-0.5, 0.5)

    low.param_callback = clamp
    bind(engine(low, steps=60)).run()
    # By symmetry a = -b at the minimum: the sum of products is -(.5 + z^2) there.
    ends = torch.stack([p.detach() for p in low.module.parameters()])
    z = 0.5 * (ends[0, 2] - ends[1, 2])
    assert torch.allclose(ends[:, :2], torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))
    assert float(ends.sum(0).norm()) < 1e-2
    assert float(4.0 * (z - aim[2]) + 4.0 * z * (0.5 + z**2)) == pytest.approx(0.0, abs=1e-2)
