"""A start that was offered: taken if it is better, worth more than a step, saved, and no trace of it otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, AutoSLS
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
def test_an_offered_start_is_taken_if_it_is_better(info: OptimizerInfo) -> None:
    for offset, start in ((-1.0, 2.0), (1.0, 3.0)):
        x, y = (nn.Parameter(torch.tensor([v])) for v in (3.0, start))
        offered, direct = info.make([x], 0.01), info.make([y], 0.01)
        offered.offer([torch.tensor([3.0 + offset])])
        state = torch.get_rng_state()
        offered.step(lambda: (x**2).sum() + 0.0 * torch.rand(()))
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        direct.step(lambda: (y**2).sum() + 0.0 * torch.rand(()))
        assert x.tolist() == y.tolist()
        assert torch.equal(torch.get_rng_state(), drawn)
        asked, usual = offered.evaluations.lower, direct.evaluations.lower
        assert asked.values - usual.values == (1 if offset < 0.0 else 2)  # at x; and after another step
        assert asked.gradients - usual.gradients == (0 if offset < 0.0 else 1)
        assert plain(offered.state["policy"]) == plain(direct.state["policy"])


@every_optimizer
@pytest.mark.parametrize(("gained", "back"), [(0.5, True), (2.0, False)])
def test_a_prediction_has_to_be_worth_more_than_a_step(info: OptimizerInfo, gained: float, back: bool) -> None:
    """The prediction gained half of, or twice, what a step of the last length gains; buffers and draws are its own."""
    if info.cls is AutoSLS:
        pytest.skip("a move without an offer shows as a sample that disagrees")
    ends = []
    for offers in (True, False):
        torch.manual_seed(0)
        x, norm = nn.Parameter(torch.tensor([4.0])), nn.BatchNorm1d(1)
        optimizer = info.make([x], 0.01)

        def loss(x: nn.Parameter = x, norm: nn.Module = norm) -> Tensor:
            return (x**2).sum() + 0.0 * norm(x * torch.rand(4, 1)).sum()

        before = x.detach().clone()
        optimizer.step(loss)
        stay = x.detach().clone()
        predicted = stay + gained * (stay - before)
        with torch.no_grad():
            x.copy_(stay if back and not offers else predicted)
        if offers:
            optimizer.offer([stay])
        optimizer.step(loss)
        ends.append(plain([x, *norm.buffers(), torch.get_rng_state(), optimizer.state["policy"]]))
    assert ends[0] == ends[1]


def test_an_offer_is_saved() -> None:
    x, y = (nn.Parameter(torch.tensor([3.0])) for _ in range(2))
    one, two = SLS([x], 0.01), SLS([y], 0.01)
    one.offer([torch.tensor([2.0])])
    two.load_state_dict(one.state_dict())
    for optimizer, p in ((one, x), (two, y)):
        optimizer.step(lambda: (p**2).sum())
    assert x.tolist() == y.tolist()
    assert x.item() < 2.0
