"""A start between a prediction and the point before: the share that is kept, saved, and no trace of it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS
from adaptive_bilevel.optim.warm_start import Parabola, Share, farther_end
from tests.evaluation.helpers import Broken
from tests.optim.helpers import OptimizerInfo, every_optimizer, plain


@every_optimizer
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("start", ["better", "worse"])
def test_an_exception_with_an_offered_start(info: OptimizerInfo, index: int, start: str) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1.0)
    optimizer.offer([torch.tensor([2.0, 1.0] if start == "better" else [4.0, 3.0])])
    calls = iter(range(100))
    before = plain([x, optimizer.state_dict(), torch.get_rng_state()])

    def closure() -> Tensor:
        torch.rand(1)
        if next(calls) == index:
            raise Broken
        return (x**2).sum()

    try:
        optimizer.step(closure)
    except Broken:
        assert plain([x, optimizer.state_dict(), torch.get_rng_state()]) == before
    else:
        assert "warm_start" not in optimizer.state[x]


@every_optimizer
@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_a_step_begins_at_the_share_that_is_kept(info: OptimizerInfo, kept: float) -> None:
    """Along p = 2 the loss x^2 is best at the share kept, and the rest of the step is as if x had been there."""
    point = {0.0: 0.5, 0.25: -0.5, 1.0: 3.5}[kept]
    x, y = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    with torch.no_grad():
        x.fill_(point + 2.0 if kept < 1.0 else 1.5)
        y.fill_(point + kept * (x.item() - point))
    norm = nn.BatchNorm1d(1)
    ends = []
    for p in (x, y):
        torch.manual_seed(0)
        norm.reset_running_stats()
        optimizer = info.make([p], 0.01)
        if p is x:
            optimizer.offer([torch.tensor([point])])
        optimizer.step(lambda p=p: (p**2).sum() + 1.0 + 0.0 * norm(p * torch.rand(4, 1)).sum())
        ends.append([p.detach(), *(b.clone() for b in norm.buffers()), torch.get_rng_state()])
        counts = optimizer.evaluations.lower
        if p is x:
            values, gradients = counts.values, counts.gradients
        else:
            assert (values, gradients) == (counts.values + 1, counts.gradients + (kept > 0.0))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-12, atol=1e-12)
    if kept in (0.0, 1.0):
        assert plain(ends[0]) == plain(ends[1])


def test_the_share_is_that_of_the_mean_of_samples() -> None:
    """Minimizers along p at 0, 1, 0, 1, ...: the parabolas (0, 1) and (-2/3, 1/3) add up to one with its own at 1/4."""
    share = Share()
    for minimizer in [0.0, 1.0] * 40:
        share = after(share, -2.0 * minimizer, minimizer**2, (1.0 - minimizer) ** 2)
    assert 0.2 < share.value < 0.3
    assert after(Share(), -1.0, 0.0, -0.5).value == 1.0
    assert after(Share(), -1.0, 0.0, -2.0).value == 1.0  # concave along p, and p descends
    assert after(Share(), 1.0, 0.0, 0.5).value == 0.0
    assert after(Share(), -1.0, 0.0, 0.0).value == 0.5
    assert after(Share(), -1.0, 0.0, torch.inf).value == 0.0
    assert after(Share(-1.0, 1.0), torch.nan, 0.0, 1.0) == Share(-1.0, 1.0)
    assert after(Share(-1.0, 1.0), 0.0, torch.nan, 1.0) == Share(-1.0, 1.0)
    assert after(Share(-1.0, 1.0), 0.0, 1.0, 1.0) == Share(-1.0, 1.0)
    one, two = after(Share(), -2.0, 5.0, 4.0), after(Share(), -2e9, 5e9, 4e9)
    assert one == two  # no unit of the loss


def after(share: Share, slope: float, stayed: float, moved: float) -> Share:
    """The share after a prediction whose gradient was taken at y."""
    return share.after(Parabola.through(0.0, stayed, slope, moved))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_parabola_is_the_same_from_each_share(share: float) -> None:
    def loss(t: float) -> float:
        return 3.0 - 2.0 * t + 5.0 * t * t

    found = Parabola.through(share, loss(share), -2.0 + 10.0 * share, loss(farther_end(share)))
    assert found == pytest.approx((3.0, -2.0, 5.0), rel=1e-12)
    for broken in (torch.nan, torch.inf):
        there = Parabola.through(share, loss(share), 1.0, broken)
        here = Parabola.through(share, broken, 1.0, loss(farther_end(share)))
        assert Share(-1.0, 1.0).after(there) == Share(-0.9, 1.9)
        assert Share(-1.0, 1.0).after(here) == (Share(-1.0, 1.0) if share == 0.0 else Share(-0.9, 1.9))


@pytest.mark.parametrize("minimizer", [0.0, 0.3, 0.8, 1.0])
def test_later_steps_begin_at_the_share_of_those_before(minimizer: float) -> None:
    """It costs a value: the parabola is that of the gradient of the step."""
    x = nn.Parameter(torch.zeros(1))
    optimizer, begun = SLS([x], 0.01), list[float]()

    def closure() -> Tensor:
        if torch.is_grad_enabled():
            begun.append(x.item())
        return (x - minimizer).square().sum() + 1.0

    for k in range(4):
        with torch.no_grad():
            x.fill_(1.0)
        optimizer.offer([torch.zeros(1)])
        counts = optimizer.evaluations.lower
        before = counts.gradients
        optimizer.step(closure)
        assert counts.gradients - before == (2 if k == 0 and minimizer > 0.0 else 1)
        assert begun[-1] == pytest.approx(minimizer, abs=1e-12)


def test_a_share_that_leads_out_of_the_domain_is_not_kept() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer, edge = SLS([x], 0.01), [2.0]
    for _ in range(2):
        with torch.no_grad():
            x.fill_(1.0)
        optimizer.offer([torch.zeros(1)])
        optimizer.step(lambda: (edge[0] - x).log().sum().square() + 1.0)
        edge[0] = 0.5
    assert shared(optimizer)["predicted_share"]["bend"] > 1.0
    assert abs(x.item()) < 0.1  # it began at 0


def test_the_share_is_saved_and_a_failed_step_leaves_none() -> None:
    x, y = (nn.Parameter(torch.tensor([3.0])) for _ in range(2))
    one, two = SLS([x], 0.01), SLS([y], 0.01)
    one.offer([torch.tensor([4.0])])
    with pytest.raises(Broken):
        one.step(_broken)
    assert "predicted_share" not in shared(one)
    one.step(lambda: (x**2).sum())
    saved = one.state_dict()
    assert shared(one)["predicted_share"]["slope"] < 0.0
    two.load_state_dict(saved)
    with torch.no_grad():
        y.copy_(x)
    for optimizer, p in ((one, x), (two, y)):
        optimizer.offer([p.detach() - 0.5])
        optimizer.step(lambda: (p**2).sum())
    assert x.tolist() == y.tolist()
    assert shared(one)["predicted_share"] == shared(two)["predicted_share"]


def shared(optimizer: SLS) -> Any:
    """What an optimizer saves that belongs to no parameter."""
    return optimizer.state_dict()["param_groups"][0]["shared_state"]


def _broken() -> Tensor:
    raise Broken


def test_an_offer_is_saved() -> None:
    x, y = (nn.Parameter(torch.tensor([3.0])) for _ in range(2))
    one, two = SLS([x], 0.01), SLS([y], 0.01)
    one.offer([torch.tensor([2.0])])
    two.load_state_dict(one.state_dict())
    for optimizer, p in ((one, x), (two, y)):
        optimizer.step(lambda: (p**2).sum())
    assert x.tolist() == y.tolist()
    assert x.item() < 2.0
