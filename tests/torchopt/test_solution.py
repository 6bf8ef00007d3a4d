"""The solution of a module: new tensors at each solve(), which must hold until the upper step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.errors import (
    ClosureError,
    HypergradientError,
    OptionError,
    TensorError,
)
from adaptive_bilevel_torchopt import UpperStep
from adaptive_bilevel_torchopt.staleness import StalenessCheck
from tests.problems import b2, ridge_hpo
from tests.torchopt.modules import EXACT_CG, implicit_module, iterate, leaf, pair, snapshot, stock


def test_a_solution_is_a_new_tensor_and_the_steps_follow() -> None:
    inner, meta, _ = pair(ridge_hpo())
    first = inner.y
    inner.solve()
    assert inner.y is not first and not inner.y.is_leaf
    meta.step(inner.val)
    assert inner.y.is_leaf and inner.lower.optimizer.param_groups[0]["params"] == [inner.y]
    inner.solve()  # the warm start, which raises where the loop is TorchOpt's and nothing is detached
    meta.step(inner.val)


@pytest.mark.parametrize("loop", ["ours", "its own"])
@pytest.mark.parametrize("what", ["x", "x.data", "y.data", "signs"])
def test_a_change_between_solve_and_the_upper_step_is_refused(what: str, loop: str) -> None:
    inner, meta, x = pair(b2()) if loop == "ours" else stock(b2())
    iterate(inner, meta)
    inner.solve()
    at = x.detach().clone()
    with torch.no_grad():
        if what == "x":
            x.add_(0.1)
        elif what == "signs":  # of the same norm
            x.neg_()
        else:
            (x if what == "x.data" else inner.y).data.add_(0.1)
    states = lambda: (meta.state_dict(), inner.lower.state_dict() if loop == "ours" else None)  # noqa: E731
    before = snapshot(x, inner.y, states())
    with pytest.raises(HypergradientError, match=r"changed between solve\(\) and the upper step.*right after solve"):
        meta.step(inner.val)
    assert snapshot(x, inner.y, states()) == before
    with torch.no_grad():
        x.copy_(at)
    inner.solve()
    meta.step(inner.val)


def swapped(t: Tensor, i: int, j: int) -> Tensor:
    flat = t.flatten().clone()
    flat[[i, j]] = flat[[j, i]]
    return flat.view_as(t)


# Changes that keep the sum and the sum of squares of all values.
REARRANGED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "two neighbours": lambda ts: [swapped(ts[0], 0, 1), *ts[1:]],
    "two swaps": lambda ts: [*ts[:2], swapped(swapped(ts[2], 0, 1), 4, 5), *ts[3:]],
    "far apart": lambda ts: [*ts[:-1], swapped(ts[-1], 3, 119_998)],
    "across the diagonal": lambda ts: [*ts[:-1], swapped(ts[-1], 5 * 4096 + 9, 9 * 4096 + 5)],
    "reversed": lambda ts: [t.flip(0) for t in ts],
    "rolled": lambda ts: [*ts[:-1], ts[-1].roll(4096)],
    "transposed": lambda ts: [*ts[:3], ts[3].T.contiguous(), *ts[4:]],
    "signs": lambda ts: [*ts[:2], torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0]).flip(0), *ts[3:]],
    "all signs": lambda ts: [*ts[:2], -ts[2], *ts[3:]],
    "two tensors": lambda ts: [ts[1], ts[0], *ts[2:]],
    "one more": lambda ts: [*ts, torch.zeros(3)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["upper", "lower"])
@pytest.mark.parametrize("name", REARRANGED)
def test_values_that_change_places_are_a_change(name: str, which: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(5)
    shapes = [(3,), (3,), (8,), (4, 4), (0,), (120_000,)]
    tensors = [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]
    tensors[2] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0], dtype=dtype)
    fixed = [torch.full((2,), float("nan"), dtype=dtype)]
    staleness = StalenessCheck()
    upper, lower = (tensors, fixed) if which == "upper" else (fixed, tensors)
    staleness.begin(upper)
    staleness.take(lower)
    assert staleness.check("test", [t.clone() for t in lower])
    changed = [t.to(dtype) for t in REARRANGED[name](tensors)]
    if which == "upper":
        staleness.upper = changed
    with pytest.raises(HypergradientError, match=f"{which} parameters changed"):
        staleness.check("test", lower if which == "upper" else changed)


def test_a_solution_that_solve_itself_changes_is_marked() -> None:
    problem = ridge_hpo()

    class Clamped(implicit_module(EXACT_CG)):  # type: ignore[misc]
        marks = True

        def solve(self) -> None:
            step = self.lower.attach()
            step(self.objective)
            self.y.data.clamp_(max=0.01)
            if self.marks:
                self.lower.mark()

    Clamped.linear_solve = EXACT_CG
    x = leaf(problem)
    inner = Clamped(x, problem).automatic()
    meta: Any = UpperStep([x], lower=inner.lower)
    iterate(inner, meta)
    inner.marks = False
    inner.solve()
    with pytest.raises(HypergradientError, match=r"end it with mark\(\)"):
        meta.step(inner.val)


def test_a_module_is_copied_after_an_upper_step_or_a_cut() -> None:
    inner, meta, _ = pair(ridge_hpo())
    iterate(inner, meta)
    copy.deepcopy(inner)
    inner.solve()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(inner)
    inner.lower.cut()
    assert torch.equal(copy.deepcopy(inner).y, inner.y)


def test_optimality_that_torchopt_derives_is_never_called_by_us(monkeypatch: Any) -> None:
    """It takes several times as long as a backward."""
    inner, meta, _ = pair(ridge_hpo())
    calls: list[str] = []
    original = type(inner).optimality

    def traced(self: Any, *args: Any) -> Any:
        calls.append(sys._getframe(1).f_code.co_filename)
        return original(self, *args)

    monkeypatch.setattr(type(inner), "optimality", traced)
    iterate(inner, meta)
    assert calls and all("torchopt/diff" in name.replace("\\", "/") for name in calls)


def test_one_module_serves_all_tasks() -> None:
    inner, meta, x = pair(ridge_hpo())
    y = inner.y
    for value in (0.5, 0.25):
        iterate(inner, meta)
        inner.lower.reset([torch.full_like(y, value)])
        assert inner.y.tolist() == [value] * 5 and inner.y.is_leaf
    inner.lower.reset()  # to the meta-parameters, as in iMAML
    assert torch.equal(inner.y, x)
    with pytest.raises(TensorError, match="one tensor for each"):
        inner.lower.reset([torch.zeros(3)])


def test_an_unsolved_problem_is_refused() -> None:
    inner, meta, x = pair(ridge_hpo())
    with pytest.raises(HypergradientError, match=r"do not come from a solve\(\)"):
        meta.step(inner.val)
    with torch.no_grad():
        inner.solve()
    with pytest.raises(HypergradientError, match="gradients enabled"):
        meta.step(inner.val)
    inner.solve()
    with pytest.raises(HypergradientError, match=r"called solve\(\)"):
        meta.step(lambda: inner.solve().val())
    inner.solve()
    with pytest.raises(HypergradientError, match="depends on no meta-parameter"):
        meta.step(lambda: torch.ones(1, requires_grad=True).sum())
    assert torch.equal(x, ridge_hpo().x0)
    meta.step(inner.val)


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("held", ["loss", "copy"])
@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
def test_one_module_for_two_tasks_of_an_upper_step_is_refused(make: Any, held: str, upper: Any) -> None:
    inner, meta, x = make(ridge_hpo(), rule=upper)
    iterate(inner, meta)
    inner.solve()
    first = inner.val() if held == "loss" else inner.y.clone()
    if held == "loss":
        inner.lower.reset([torch.zeros(5)]) if inner.lower else inner.y.detach_().requires_grad_()
    inner.solve()
    before = snapshot(x, inner.y, meta.state_dict())
    with pytest.raises(HypergradientError, match=r"One module serves one task.*FunctionalLowerStep"):
        meta.step(lambda: inner.val() + first.sum())
    assert snapshot(x, inner.y, meta.state_dict()) == before
    for other in {inner, inner.lower or inner}:
        with pytest.raises(OptionError, match=r"listed twice.*a module for each task"):
            UpperStep([x], upper, lower=[inner, other])
    inner.solve()
    meta.step(inner.val)


@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
@pytest.mark.parametrize(("upper", "when"), [(BiSLS, "this"), (BiSLS, "the last"), (BiSPS, "the last")])
def test_an_upper_loss_from_before_the_step_is_refused(make: Any, upper: Any, when: str) -> None:
    inner, meta, x = make(ridge_hpo(), rule=upper)
    inner.solve()
    loss = inner.val() if when == "this" else x.exp().sum()
    if when == "the last":
        torch.autograd.grad(loss, x)
    before = snapshot(x, x.grad, meta.state_dict())
    with pytest.raises(ClosureError, match=r"computed before step\(\).*meta\.step\(lambda: val\(inner\)\)"):
        meta.step(lambda: inner.val() + loss)
    assert snapshot(x, x.grad, meta.state_dict()) == before
    inner.solve()
    meta.step(inner.val)


def test_warm_start_goes_on_from_the_last_solution() -> None:
    inner, meta, _ = pair(ridge_hpo(), T=3, carry=False)
    iterate(inner, meta)
    before = inner.y.detach().clone()
    losses = []
    inner.lower.optimizer.register_step_pre_hook(lambda *a: losses.append(inner.y.detach().clone()))
    inner.solve()
    assert torch.equal(losses[0], before)
    inner.solve()  # again without an upper step, as a stochastic method may
    assert not torch.equal(losses[3], before)
