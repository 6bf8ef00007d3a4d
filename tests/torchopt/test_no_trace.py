"""What an upper step leaves behind: nothing of a trial, of a failed search or of an exception, and no memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.policies import Outcome
from tests.problems import b2, ridge_hpo
from tests.torchopt.modules import SOLVE, iterate, pair, snapshot, stock


@pytest.mark.parametrize("at", range(5))
def test_whatever_an_exception_meets_is_as_before(at: int) -> None:
    inner, meta, x = pair(b2(), c=0.999, curvature=1e-9)  # many trials
    iterate_until_rejections = [0]
    inner.solve()
    x.grad = torch.full_like(x, 7.0)
    values = [t.detach().clone() for t in (x, inner.y)]
    state = snapshot(meta.state_dict(), inner.lower.state_dict()["param_groups"])

    def closure() -> Tensor:
        torch.rand(1)
        iterate_until_rejections[0] += 1
        if iterate_until_rejections[0] == at + 1:
            raise KeyboardInterrupt
        return inner.val()

    with pytest.raises(KeyboardInterrupt):
        meta.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(values, (x.detach(), inner.y.detach()), strict=True))
    assert x.grad is not None and x.grad.tolist() == [7.0, 7.0]
    assert snapshot(meta.state_dict(), inner.lower.state_dict()["param_groups"]) == state


def test_a_failed_search_moves_nothing() -> None:
    inner, meta, x = pair(b2(), max_trials=1, lr=1e6, lower_bound=None)
    inner.solve()
    before = [t.detach().clone() for t in (x, inner.y)]
    with pytest.warns(UserWarning, match="no trial step"):
        meta.step(inner.val)
    assert Outcome(meta.record.outcome) == Outcome.search_failed
    assert all(torch.equal(a, b) for a, b in zip(before, (x, inner.y), strict=True))


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_a_loss_that_is_not_finite_moves_nothing(upper: Any) -> None:
    inner, meta, x = pair(ridge_hpo(), rule=upper)
    iterate(inner, meta)
    inner.solve()
    before = snapshot(x, inner.y, meta.state_dict())
    meta.step(lambda: inner.val() * float("nan"))
    assert snapshot(x, inner.y, meta.state_dict()) == before and Outcome(meta.record.outcome) == Outcome.non_finite


def live_tensors() -> list[Any]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]  # isinstance() would wake lazy modules


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_the_number_of_live_tensors_is_constant(upper: Any) -> None:
    of_others = live_tensors()  # kept here: what an earlier test left may be freed at any time, and is not counted
    inner, meta, _ = pair(ridge_hpo(), T=1, rule=upper, linear_solve=SOLVE.solve_cg(maxiter=2))
    counts = []
    for k in range(200):
        inner.lower.reset([torch.zeros(5)])
        iterate(inner, meta)
        if k in (59, 99, 199):  # the history holds the losses of 50 steps
            counts.append(len(live_tensors()) - len(of_others))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("made", [pair, stock], ids=["ours below", "stock below"])
def test_both_levels_go_back_where_the_loss_leaves_its_recent_values(made: Any) -> None:
    inner, meta, x = made(ridge_hpo(), rule=BiSLS, carry=False)
    points = []
    for _ in range(9):
        inner.solve()
        points.append([t.detach().clone() for t in (x, inner.y)])
        meta.step(inner.val)
    inner.solve()
    far = inner.y.detach().clone()

    def left() -> Tensor:
        loss: Tensor = inner.val()
        return loss if any(torch.equal(x.detach(), point[0]) for point in points) else loss + 1e3

    with pytest.warns(UserWarning, match="left the minimum"):
        meta.step(left)
    assert Outcome(meta.record.outcome) == Outcome.returned
    assert any(torch.equal(x.detach(), point[0]) and torch.equal(inner.y.detach(), point[1]) for point in points)
    assert not torch.equal(far, inner.y.detach())
    inner.solve()
    meta.step(inner.val)
    assert meta.record.moved
