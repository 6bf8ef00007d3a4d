"""What Betty's engine does with our optimizers: the graph's services, and starting points."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel.errors import NonFiniteError
from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_betty import SLS, SPSB, BiSLS, SPSMax, bind
from tests.betty.problems import Level, Ridge, Variable, engine, only_new, only_old
from tests.optim.helpers import plain

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:BiSLS. for 20 steps")


def test_counts_go_through_the_logger() -> None:
    logged: list[tuple[str, int, dict[str, Any]]] = []
    top, low = Ridge().levels(BiSLS, SLS, log_step=1)
    top.log_step = 1
    made = bind(engine(low, top, steps=20))

    class Logger:
        def log(self, stats: Any, tag: str, step: int) -> None:
            logged.append((tag, step, dict(stats)))

        def info(self, text: str) -> None:
            pass

    low.logger = top.logger = made.logger = Logger()
    made.run()
    assert [tag for tag, _, _ in logged].count("outer") == 2
    for tag, _, stats in logged:
        assert set(stats) == {"loss", "step_size", "trials", "outcome"}, tag
        assert all(isinstance(value, (int, float)) for value in stats.values())
        assert stats["trials"] >= 1
    assert logged[-1][2]["step_size"] == top.optimizer.param_groups[0]["step_size"]


def test_metrics_of_the_user_are_kept() -> None:
    low = Level("inner", lambda p, b: {"loss": p.module().square().sum(), "trials": -5}, Variable(torch.ones(1)), SLS)
    bind(engine(low, steps=1))
    low._count = 1
    report = low.one_step_descent()
    assert report["trials"] == -5
    assert report["step_size"] > 0


def test_schedulers_scale_the_bound() -> None:
    low = Level(
        "inner",
        lambda p, b: p.module().square().sum(),
        Variable(torch.ones(1)),
        lambda p: SPSMax(p, lower_bound=-1e9, lr=1e-3),
    )
    low.configure_scheduler = lambda: torch.optim.lr_scheduler.LambdaLR(low.optimizer, lambda k: 0.5**k)
    made = bind(engine(low, steps=3))
    made.run()
    assert low.optimizer.param_groups[0]["step_size"] == pytest.approx(0.25e-3)


def test_schedulers_scale_the_step_that_a_search_finds() -> None:
    low = Level("inner", lambda p, b: p.module().square().sum(), Variable(torch.ones(1)), SLS)
    low.configure_scheduler = lambda: torch.optim.lr_scheduler.LambdaLR(low.optimizer, lambda k: 0.1**k)
    made = bind(engine(low, steps=3))
    made.run()
    found = low.optimizer.state["policy"]["previous"]
    assert low.optimizer.param_groups[0]["step_size"] == pytest.approx(0.01 * found)


@only_new
def test_parameter_groups_of_the_problem() -> None:
    low = Level(
        "inner", lambda p, b: (p.module(torch.ones(1, 3)) - 1).square().sum(), nn.Linear(3, 2), lambda p: SLS(p, 0.5)
    )
    low.param_groups = lambda: [
        {"params": [low.module.weight], "lr": 0.4},
        {"params": [low.module.bias], "lr": 0.1},
    ]
    made = bind(engine(low, steps=3))
    made.run()
    first, second = low.optimizer.param_groups
    assert first["step_size"] == pytest.approx(4 * second["step_size"])
    assert low.losses[-1] < low.losses[0]


def test_frozen_parameters_stay() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    low = Level("inner", lambda p, b: (p.module(torch.ones(1, 3)) - 1).square().sum(), module, SLS)
    before = module.bias.detach().clone()
    # Betty's backward takes gradients of the trainable parameters, frozen ones included, so the user leaves them out.
    low.trainable_parameters = lambda: [module.weight]
    bind(engine(low, steps=10)).run()
    assert torch.equal(module.bias, before)
    assert low.losses[-1] < 0.1 * low.losses[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_losses_move_nothing(value: float) -> None:
    poison = {"at": 3}

    def loss(problem: Any, batch: Any) -> Tensor:
        scale = value if len(problem.losses) == poison["at"] else 1.0
        y: Tensor = problem.module()
        return scale * y.square().sum()

    low = Level("inner", loss, Variable(torch.ones(2)), lambda p: SLS(p, 0.01))
    made = bind(engine(low, steps=3))
    made.run()
    before = low.value.clone()
    saved = plain(low.optimizer.state_dict())
    low.step()
    assert torch.equal(low.value, before)
    assert plain(low.optimizer.state_dict()) == saved
    assert low.optimizer.record.outcome == Outcome.non_finite
    low.step()
    assert low.optimizer.record.moved


def test_an_exception_in_a_trial_leaves_no_trace() -> None:
    def loss(problem: Any, batch: Any) -> Tensor:
        if problem.in_trial:
            raise KeyboardInterrupt
        value: Tensor = nn.functional.dropout(problem.module(), 0.5).square().sum()
        return value

    low = Level("inner", loss, Variable(torch.ones(4)), SLS)
    made = bind(engine(low, steps=1))
    torch.manual_seed(0)
    nn.functional.dropout(torch.ones(4), 0.5)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert torch.equal(low.value, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), expected)
    assert low.in_trial is False


def test_a_cold_start_voids_the_prediction() -> None:
    """on_inner_loop_start zeroes y: what the upper step has moved it by is lost."""
    ends = []
    for carry in ("auto", False):
        top, low = Ridge().levels(lambda p, carry=carry: BiSLS(p, carry=carry), SLS)
        low.on_inner_loop_start = lambda low=low: low.module.value.data.zero_()
        made = bind(engine(low, top, steps=100))
        made.run()
        ends.append((top.value.clone(), low.optimizer.evaluations.lower, low.losses))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_a_step_moves_the_lower_problem_along() -> None:
    top, low = Ridge().levels(BiSLS, SLS, type="adaptive_cg")
    made = bind(engine(low, top, steps=40))
    made.run()
    moved = low.value.clone()
    state = top.optimizer.state["prediction"]
    assert state["bend"] > 0.0 > state["slope"]  # the tangent of a quadratic descends
    with torch.no_grad():
        before = moved - state["kept"] * state["length"] * state["moved"][0]
    assert not torch.equal(moved, before)
    values = low.optimizer.evaluations.lower.values
    low.step()
    assert low.optimizer.evaluations.lower.values - values == low.optimizer.record.trials


@only_new
@pytest.mark.parametrize("how", ["grad_callback", "gradient_clipping"])
def test_gradients_are_processed_after_a_prediction_too(how: str) -> None:
    """Whichever starting point a lower step takes, it moves from there along what Betty makes of the gradient."""
    torch.manual_seed(0)
    A, target = torch.randn(6, 4), torch.arange(1.0, 5.0)
    top = Level("outer", lambda p, b: (p.inner() - target).square().sum(), Variable(torch.zeros(4)), BiSLS)
    low = Level(
        "inner",
        lambda p, b: (A @ (p.module() - p.outer())).square().mean() + 0.01 * p.module().square().sum(),
        Variable(torch.ones(4)),
        lambda params: SLS(params, 0.1, max_step=0.1, reset="initial", grow=1.0),
        unroll_steps=3,
        gradient_clipping=0.5 if how == "gradient_clipping" else 0.0,
    )
    if how == "grad_callback":
        low.grad_callback = lambda: low.module.value.grad[:1].zero_()
    made = bind(engine(low, top, steps=30))
    moves: list[Tensor] = []
    step, evaluate = low.optimizer.step, low.optimizer._evaluate

    def spy() -> Any:
        starts: list[Tensor] = []

        def start(*arguments: Any) -> Any:
            found = evaluate(*arguments)
            starts.append(low.value.clone())
            return found

        low.optimizer._evaluate = start
        step()
        moves.append((low.value - starts[0]) / low.optimizer.record.step_size)

    low.optimizer.step = spy
    made.run()
    assert len(moves) == 30
    if how == "grad_callback":
        assert all(float(d[0]) == 0.0 for d in moves)
    else:
        assert all(float(d.norm()) <= 0.5 * (1.0 + 1e-6) for d in moves)


def test_a_loss_that_chooses_the_batch_is_no_part_of_the_step() -> None:
    class Choosing(Level):
        def get_batch(self) -> Any:
            batches = [(torch.full((1,), aim),) for aim in (5.0, 1.0)]
            with torch.no_grad():
                values = [float(self.get_loss(batch)[0]) for batch in batches]
            return batches[values.index(min(values))]

    low = Choosing("one", lambda p, b: (p.module() - b[0]).square().sum(), Variable(torch.zeros(1)), SLS)
    bind(engine(low, steps=30)).run()
    assert float(low.value) == pytest.approx(1.0)


def test_a_first_trial_that_is_too_short_is_outgrown_at_once() -> None:
    """In the first search, by doubling until a trial does not pass; by 1.2 or 2 from then on, also after a resume."""
    top, low = Ridge().levels(lambda p: BiSLS(p, 1e-4), SLS, type="adaptive_cg", T=5)
    made = bind(engine(low, top, steps=5))
    steps, trials = [], []
    for _ in range(40):
        made.run()
        steps.append(top.optimizer.record.step_size)
        trials.append(top.optimizer.record.trials)
        top.optimizer.load_state_dict(top.optimizer.state_dict())
    assert trials[0] > 5
    assert steps[0] == pytest.approx(1e-4 * 2 ** (trials[0] - 1))  # a longer one could not pass
    growth = [b / a for a, b in itertools.pairwise(steps) if a > 0]
    assert growth[0] <= 1.2 + 1e-9
    assert max(growth) <= 2.0 + 1e-9  # where steps have outgrown what was rejected


def test_too_many_skips_raise() -> None:
    low = Level(
        "inner", lambda p, b: p.module().sum() * math.nan, Variable(torch.ones(1)), lambda p: SPSB(p, max_skips=3)
    )
    with pytest.raises(NonFiniteError, match="3 steps"):
        bind(engine(low, steps=10)).run()


@only_old
def test_the_old_release_configures_twice() -> None:
    made = []

    def optimizer(params: Any) -> Any:
        made.append(SLS(params))
        return made[-1]

    low = Level("inner", lambda p, b: p.module().square().sum(), Variable(torch.ones(1)), optimizer)
    bind(engine(low, steps=2)).run()
    assert len(made) == 2
    assert low.optimizer is made[1]
