"""AutoSLS is SLS where all samples are one function, whatever happens between loops, and averages elsewhere."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from adaptive_bilevel import SLS, SLSB, AutoSLS, BiSLS, policies
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.policies import SearchState

from .helpers import leaf


def data(seed: int, wrong: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(200, 10, generator=rng)
    labels = torch.sign(features @ torch.randn(10, generator=rng))
    labels[torch.rand(200, generator=rng) < wrong] *= -1
    return features, labels


def loss_of(features: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Logistic regression with a penalty exp(x)."""
    return lambda x, w: softplus(-labels * (features @ w)).mean() + 0.5 * x.exp() * w.square().sum()


def agrees(optimizer: Any) -> bool:
    return bool(optimizer.policy.agrees(optimizer._rule_state()))


@pytest.mark.parametrize("lower_steps", [1, 2, 10])
def test_full_batches_of_a_lower_level_are_searched_as_by_sls(lower_steps: int) -> None:
    training, validation = loss_of(*data(0, 0.2)), loss_of(*data(1, 0.0))

    def trained(rule: Any) -> list[Tensor]:
        x, w = leaf(0.0), torch.nn.Parameter(torch.zeros(10))
        inner = rule([w], 1.0)
        outer = BiSLS([x], lower=inner)
        steps = []

        def lower() -> Tensor:
            return training(x.squeeze(), w)

        def upper() -> Tensor:
            return validation(torch.tensor(-30.0), w)

        for _ in range(15):
            for _ in range(lower_steps):
                inner.step(lower)
                steps.append(torch.tensor(inner.record.step_size))
            assign([x], implicit(upper, lower, [x], [w]))
            outer.step(upper)
        return [*steps, x.detach(), w.detach()]

    assert torch.equal(torch.stack(trained(AutoSLS)[:-2]), torch.stack(trained(SLS)[:-2]))


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("lower_steps", [1, 5, 15])
def test_what_the_upper_variable_changes_of_the_loss_is_not_taken_for_another_sample(
    lower_steps: int, noise: float
) -> None:
    """The least lower loss rises with x, so that the lower losses of a run hardly fall. Samples last a whole loop."""
    rng = torch.Generator().manual_seed(0)
    curvatures = torch.logspace(0.0, -6.0, 6)
    x, y = torch.nn.Parameter(torch.full((6,), 2.0)), torch.nn.Parameter(torch.zeros(6))
    inner = AutoSLS([y], lower_bound=None)
    outer = BiSLS([x], lower=inner)
    for _ in range(40):
        shift = noise * torch.randn(6, generator=rng)

        def lower(shift: Tensor = shift) -> Tensor:
            return 0.5 * (curvatures * y * y).sum() - (curvatures * y) @ (x + shift)

        def upper() -> Tensor:
            return 0.5 * y.square().sum() + 0.01 * x.square().sum()

        for _ in range(lower_steps):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        outer.step(upper)
    assert agrees(inner) == (noise == 0.0)


@pytest.mark.parametrize("direction, tasks", [("sgd", 1), ("sgd", 3), ("adam", 1)])
def test_loops_that_start_anew_are_searched_as_by_sls(direction: str, tasks: int) -> None:
    """Each task is one function; what happens between two loops says nothing of its samples."""
    losses = [loss_of(*data(seed, 0.2)) for seed in range(tasks)]

    def trained(rule: Any) -> list[float]:
        w = torch.nn.Parameter(torch.zeros(10))
        optimizer, steps = rule([w], direction=direction), []
        for loop in range(12):
            torch.nn.init.zeros_(w) if loop % 2 else w.data.zero_()
            for _ in range(5):
                optimizer.step(partial(losses[loop % tasks], torch.tensor(-3.0), w))
                steps.append(optimizer.record.step_size)
        assert rule is SLS or agrees(optimizer)
        return steps

    ours = trained(AutoSLS)
    if direction == "sgd":  # along Adam the first step has another length, which stays in the moments
        assert ours[1:] == pytest.approx(trained(SLS)[1:], rel=1e-12)


@pytest.mark.parametrize("between", ["start anew", "project"])
def test_samples_that_disagree_show_whatever_moves_the_parameters(between: str) -> None:
    (features, labels), w = data(0, 0.4), torch.nn.Parameter(torch.zeros(10))
    optimizer = AutoSLS([w])
    for k in range(60):
        rows = torch.arange(4) + 4 * (k % 40)
        optimizer.step(partial(loss_of(features[rows], labels[rows]), torch.tensor(-3.0), w))
        with torch.no_grad():
            if between == "project":
                w.clamp_(-0.3, 0.3)
            elif k % 5 == 4:
                w.zero_()
    assert not agrees(optimizer)


def test_a_resumed_run_starts_anew_where_the_run_does() -> None:
    loss = loss_of(*data(0, 0.2))

    def run(resumed: bool) -> list[float]:
        w = torch.nn.Parameter(torch.zeros(10))
        optimizer = AutoSLS([w])
        for k in range(20):
            if k % 5 == 0:
                w.data.zero_()
            if resumed and k == 10:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = AutoSLS([w])
                optimizer.load_state_dict(state)
            optimizer.step(partial(loss, torch.tensor(-3.0), w))
        assert agrees(optimizer)
        return w.tolist()

    assert run(True) == run(False)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_wrong_labels_are_averaged_out(direction: str) -> None:
    """In batches of 8, each of which can be fitted: SLS does, and is lost."""
    features, labels = data(0, 0.3)

    def trained(rule: Any) -> tuple[float, Any]:
        rng, w = torch.Generator().manual_seed(1), torch.nn.Parameter(torch.zeros(10))
        optimizer = rule([w], direction=direction)
        for _ in range(500):
            drawn = torch.randint(200, (8,), generator=rng)
            optimizer.step(lambda drawn=drawn: softplus(-labels[drawn] * (features[drawn] @ w)).mean())
        return float(softplus(-labels * (features @ w.detach())).mean()), optimizer

    (auto, optimizer), (bounded, _), (unbounded, _) = map(trained, (AutoSLS, SLSB, SLS))
    assert not agrees(optimizer)
    assert auto < 1.05 * bounded
    assert unbounded > 2.0 * auto


def run(optimizer: Any, x: Tensor, targets: list[float], calls: list[float] | None = None) -> None:
    """Step on (x - target)^2 / 2 for each target."""
    for target in targets:

        def loss(target: float = target) -> Tensor:
            if calls is not None:
                calls.append(float(x.detach()))
            return 0.5 * (x - target).square().sum() + 1.0

        optimizer.step(loss)


NOISE = [1.0, -1.0, 3.0, -2.0, 0.5, -1.5, 2.0, -0.5] * 8


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_the_parameters_hold_the_mean_and_gradients_are_taken_ahead_of_it(direction: str) -> None:
    x, seen = leaf(2.0), list[float]()
    optimizer: Any = AutoSLS([x], direction=direction)
    run(optimizer, x, NOISE)
    ahead = float(optimizer.state[x]["averaging"]["ahead"])
    rest = float(x.detach())
    assert abs(ahead) > 1e-3
    before = optimizer.evaluations.lower
    values, gradients = before.values, before.gradients
    run(optimizer, x, [1.0], seen)
    assert seen == pytest.approx([rest, rest + ahead])  # a value at the mean, a gradient ahead of it
    assert (optimizer.evaluations.lower.values - values, optimizer.evaluations.lower.gradients - gradients) == (1, 1)


def test_a_mean_that_is_moved_begins_anew() -> None:
    x = leaf(2.0)
    optimizer: Any = AutoSLS([x])
    run(optimizer, x, NOISE)
    assert optimizer.state["averaging"]["count"] > 1
    x.data.fill_(2.0)
    seen: list[float] = []
    run(optimizer, x, [0.0], seen)
    assert seen == [2.0]
    assert optimizer.state["averaging"]["count"] == 1


def test_a_mean_that_is_behind_begins_anew() -> None:
    """The solution runs away by 1 a step: the mean of the iterates is late, and is given up."""
    x = leaf(2.0)
    optimizer: Any = AutoSLS([x], 0.5, decay="constant")
    run(optimizer, x, [1.0, -1.0] * 4)
    counts = []
    for k in range(60):
        run(optimizer, x, [float(k)])
        counts.append(optimizer.state["averaging"]["count"])
    assert max(counts) < 40


@pytest.mark.parametrize("bad", ["inf", "raise", "zero"])
def test_a_step_that_does_not_move_leaves_the_mean(bad: str) -> None:
    x = leaf(2.0)
    optimizer: Any = AutoSLS([x])
    run(optimizer, x, NOISE)
    rest, state = x.detach().clone(), dict(optimizer.state["averaging"])

    def loss() -> Tensor:
        if bad == "raise" and optimizer.evaluations.lower.gradients > len(NOISE):
            raise KeyboardInterrupt
        return (x.sum() * 0.0 + 3.0) if bad == "zero" else x.sum() * math.inf

    try:
        optimizer.step(loss)
    except KeyboardInterrupt:
        pass
    assert torch.equal(x.detach(), rest)
    assert optimizer.state["averaging"] == state


def test_saved_state_goes_on_bitwise() -> None:
    x = leaf(2.0)
    optimizer: Any = AutoSLS([x])
    run(optimizer, x, NOISE)
    other = leaf(float(x.detach()))
    copy: Any = AutoSLS([other])
    copy.load_state_dict(optimizer.state_dict())
    run(optimizer, x, NOISE)
    run(copy, other, NOISE)
    assert torch.equal(x.detach(), other.detach())


@pytest.mark.parametrize("seed", [1, 2])
def test_an_iterate_that_is_lost_is_put_back_to_the_mean(seed: int) -> None:
    """Each sample is a smooth valley around its own point, with a cliff at 1.5 for all."""
    random, x = torch.Generator().manual_seed(seed), leaf(1.0, 1.0)
    optimizer, losses = AutoSLS([x]), list[float]()

    def loss(valley: Tensor) -> Tensor:
        return torch.cosh(x - valley).log().sum() + 1e3 * torch.relu(x.abs() - 1.5).sum()

    with pytest.warns(AdaptiveBilevelWarning, match="goes on from that mean with shorter steps"):
        for _ in range(200):
            valley = torch.randn(2, generator=random, dtype=torch.float64)
            losses.append(float(optimizer.step(partial(loss, valley))))
    assert max(losses[100:]) < 10.0
    assert float(x.detach().abs().max()) < 0.5


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_iterate_without_a_finite_loss_is_taken_back(bad: float) -> None:
    random, x = torch.Generator().manual_seed(1), leaf(1.0, 1.0)
    optimizer, losses = AutoSLS([x]), list[float]()

    def loss(valley: Tensor) -> Tensor:
        value = torch.cosh(x - valley).log().sum()
        return value + bad if float(x.detach().abs().max()) > 1.5 else value

    with pytest.warns(AdaptiveBilevelWarning, match=f"after the last step is {bad}.*goes on from that mean"):
        for _ in range(200):
            losses.append(float(optimizer.step(partial(loss, torch.randn(2, generator=random, dtype=torch.float64)))))
    assert all(map(math.isfinite, losses))
    assert float(x.detach().abs().max()) < 0.5


def test_a_lost_iterate_is_far_above_the_losses_so_far() -> None:
    policy = policies.AutoSLS()
    state = SearchState(highest=2.0, lowest=1.5, ranged=8, distance=4.0, found=1.0, previous=1.0, longest=1.0, path=3.0)
    assert policy.lost(state, 2.6, 1.5)
    assert not policy.lost(state, 2.4, 1.0)  # within the range of 1.5 to 2, and once more of it
    assert not policy.lost(state, 2.6, 2.2)  # this sample is harder
    for bad in (math.inf, math.nan):
        assert policy.lost(state, bad, 1.0)
        assert not policy.lost(state, bad, bad)  # the sample is at fault
    assert not policy.lost(state._replace(ranged=4), 3.9, 1.0)  # four losses: their range counts four times
    assert not policy.lost(state._replace(ranged=1), 9.0, 1.0)  # one loss has no range
    assert not policy.lost(state._replace(lowest=2.0), 9.0, 1.0)
    after = policy.returned(state)
    assert (after.distance, after.found, after.longest, after.previous, after.path) == (1.0, 0.5, 0.25, 0.5, 0.0)
    after = policy.returned(state._replace(previous=0.25))  # the step was a quarter of the bound
    assert (after.distance, after.found, after.longest) == (0.0625, 0.125, 0.0625)


def test_no_step_without_a_search_is_more_than_twice_the_longest_before() -> None:
    """Steps of up to 1,500 do not raise the first sample; the next ones fall until they rise steeply from -10 on."""
    x, random = leaf(1.0), torch.Generator().manual_seed(0)
    optimizer, steps, losses, bounds = AutoSLS([x]), list[float](), list[float](), list[float]()
    kept: Any = optimizer.state

    def loss(level: float) -> Tensor:
        if not steps:
            return (level + torch.where(x > 0.81, 0.1 * (x - 0.9).abs(), 0.009)).sum()
        return (level + 0.1 * x + 1e3 * torch.relu(-10.0 - x) ** 2).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*goes on from that mean")
        for _ in range(100):
            losses.append(float(optimizer.step(partial(loss, 2.0 + float(torch.rand((), generator=random))))))
            assert optimizer.record is not None
            steps.append(optimizer.record.step_size)
            bounds.append(kept["policy"]["found"])
    assert bounds[0] > 100.0 * steps[0]
    assert all(step <= 2.0 * max(steps[:k]) for k, step in enumerate(steps) if k > 1)
    assert max(losses) < 1e4 and max(losses[50:]) < 100.0


def test_decreases_that_the_next_sample_does_not_confirm_count() -> None:
    """Steps from 2 to 1.5 seen: 1.5 confirms it, 1.7 leaves .2 of .5, 9 all of it."""
    policy = policies.AutoSLS(bound=0.25, grow=1.0)
    for loss, expected in ((1.5, 0.0), (1.7, 0.2), (9.0, 0.5)):
        _, state = policy.step(policy.init(), loss=2.0, slope=1.0, trial=lambda a: 1.5)
        _, state = policy.step(state, loss=loss, slope=1.0, trial=lambda a: 0.0, rounding=0.0)
        assert (state.differing, state.decreases) == pytest.approx((expected, 0.5))
        assert policy.agrees(state) == (loss < 9.0)


def test_the_margin_sums_what_losses_fell_beyond_the_promise() -> None:
    """Losses 2, 1.5 and gains of 4 times .25 with c = .1: M = .5 - .1; a rise counts as one gain at most."""
    for loss, expected in ((1.5, 0.4), (100.0, -1.1)):
        policy = policies.AutoSLS(bound=0.25, grow=1.0)
        _, state = policy.step(policy.init(), loss=2.0, slope=4.0, trial=lambda a: 1.0)
        _, state = policy.step(state, loss=loss, slope=4.0, trial=lambda a: 0.0, rounding=0.0)
        assert state.margin == pytest.approx(expected)


def test_where_samples_disagree_the_bound_is_the_step_and_nothing_is_tried() -> None:
    policy = policies.AutoSLS(bound=0.25)
    state = SearchState(count=7, previous=0.01, margin=-1.0)

    def trial(step: float) -> float:
        raise AssertionError

    record, after = policy.step(state, loss=1.0, slope=1e-3, trial=trial)
    assert record.step_size == record.bound == pytest.approx(0.125)  # .25 / cbrt(7 + 1)
    assert (record.trials, after.count) == (0, 8)
    record, _ = policy.step(state, loss=1e-6, slope=1.0, trial=trial)
    assert record.step_size == pytest.approx(1e-5)  # no step above loss / (c slope)


@pytest.mark.parametrize("passes, expected, trials", [(1.0, 0.125, 1), (0.05, 0.03125, 3)])
def test_below_an_upper_level_steps_are_searched_up_to_the_bound(passes: float, expected: float, trials: int) -> None:
    """Longer steps overfit before the upper variable has moved, so each step has to lower the loss of its sample."""
    policy = policies.AutoSLS(bound=0.25)
    state = policy.displaced(SearchState(count=7, previous=1.0, margin=-1.0), None)
    record, after = policy.step(state, loss=1.0, slope=1e-3, trial=lambda a: 0.0 if a <= passes else 2.0)
    assert record.step_size == pytest.approx(expected)  # from .25 / cbrt(7 + 1)
    assert (record.trials, after.count, after.nested) == (trials, 8, 1)


def test_an_upper_step_makes_the_rule_search() -> None:
    training = [loss_of(*data(seed, 0.5)) for seed in range(10)]
    x, w = leaf(0.0), torch.nn.Parameter(torch.zeros(10))
    inner = AutoSLS([w])
    outer = BiSLS([x], lower=inner)
    trials = []

    def loss(k: int) -> Tensor:
        return training[k % 10](x.squeeze(), w)

    for k in range(40):
        inner.step(partial(loss, k))
        assert inner.record is not None
        trials.append((agrees(inner), inner.record.trials))
        if k == 20:
            assign([x], implicit(partial(loss, 0), partial(loss, 1), [x], [w]))
            outer.step(partial(loss, 0))
    assert {trials for agree, trials in trials[5:21] if not agree} == {0}
    assert min(trials for _, trials in trials[21:]) >= 1


def test_a_step_that_does_not_move_leaves_no_trace() -> None:
    policy = policies.AutoSLS()
    _, state = policy.step(policy.init(), loss=2.0, slope=4.0, trial=lambda a: 2.0 * (0.9 - a) ** 2 + 0.1)
    samples: list[dict[str, Any]] = [
        {"loss": math.nan, "slope": 4.0},
        {"loss": 9.0, "slope": 0.0},
        {"loss": 9.0, "slope": -1.0},
    ]
    for sample in samples:
        assert policy.step(state, trial=lambda a: 0.0, **sample)[1] == state
    assert policy.step(state, loss=state.expected, slope=4.0, trial=lambda a: 10.0)[1] == state


def test_a_high_loss_of_a_harder_sample_leaves_the_step_as_it_is() -> None:
    """The extra look changes neither parameters nor buffers."""

    def run_of(looks: bool) -> tuple[Tensor, Tensor, int]:
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(3, momentum=1.0, dtype=torch.float64)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.float64), norm)
        optimizer, random = AutoSLS(model.parameters()), torch.Generator().manual_seed(1)
        kept: Any = optimizer.state

        def loss(rows: Tensor, target: Tensor, level: float) -> Tensor:
            return (model(rows) - target).square().mean() + level

        for k in range(14):
            rows, target = (torch.randn(16, 3, generator=random, dtype=torch.float64) for _ in range(2))
            if k == 13 and not looks:
                kept["policy"] = {**kept["policy"], "ranged": 0}  # what is not known is not compared
            before = optimizer.evaluations.lower.values
            optimizer.step(partial(loss, rows, target, 100.0 * (k == 13)))
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert norm.running_mean is not None
        return weights, norm.running_mean.clone(), optimizer.evaluations.lower.values - before

    looked, plain = run_of(True), run_of(False)
    assert looked[2] == plain[2] + 1
    assert torch.equal(looked[0], plain[0]) and torch.equal(looked[1], plain[1])
