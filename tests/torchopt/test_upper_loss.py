"""The upper loss is evaluated and differentiated once, and what that one backward gives is TorchOpt's to the bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import ClosureError, HypergradientError
from adaptive_bilevel.policies import Constant
from adaptive_bilevel_torchopt import UpperStep
from tests.problems import Problem, b2, ridge_hpo, softmax_toy
from tests.torchopt.modules import EXACT_CG, implicit_module, iterate, leaf, pair, snapshot, stock


def direct(x: Tensor) -> Tensor:
    """Uses x several times, in nodes before and after each other."""
    z = x.sin()
    return (z * x).sum() + (x.exp() + z).square().mean() + x[0]


@pytest.mark.filterwarnings("ignore:.*left the minimum")  # of the paper's search, f rises from the start
@pytest.mark.parametrize("rule", [BiSLS, OneStepBiSLS])
def test_the_upper_loss_is_differentiated_once_a_step(rule: Any) -> None:
    inner, meta, _ = pair(b2(), rule=rule)
    attached = []

    def closure() -> Tensor:
        attached.append(torch.is_grad_enabled())
        loss: Tensor = inner.val()
        return loss

    for _ in range(5):
        iterate(inner, meta, closure)
    counts = meta.evaluations.upper
    assert sum(attached) == counts.gradients == 5 and len(attached) == counts.gradients + counts.values


@pytest.mark.parametrize("rule", [BiSLS, BiSPS, OneStepBiSLS, Constant(bound=0.1)], ids=str)
@pytest.mark.parametrize("problem", [b2(), ridge_hpo(), softmax_toy()], ids=lambda p: p.name)
@pytest.mark.parametrize("hook", [None, lambda g: g.clamp(-0.3, 0.3), lambda g: 0.7 * g], ids=["", "clipped", "scaled"])
def test_the_hypergradient_is_torchopt_s_to_the_bit(rule: Any, problem: Problem, hook: Any) -> None:
    """Also where x is used several times, by several tasks, and where hooks change its gradient."""
    grads = []
    for automatic in (True, False):
        x = leaf(problem)
        if hook is not None:
            x.register_hook(hook)
        inners = [implicit_module(EXACT_CG)(x, problem, T).automatic(Constant(bound=0.1)) for T in (3, 7, 5)]
        meta = UpperStep([x], rule, lower=[inner.lower for inner in inners])
        for inner in inners:
            inner.y.data.mul_(0.5)
        for inner in (inners[1], inners[2], inners[0]):
            inner.solve()
        loss = lambda: direct(x) + torch.stack([inner.val() for inner in inners]).sum() + direct(x)  # noqa: E731
        if automatic:
            meta.step(loss)
        else:
            loss().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_hook_that_changes_grad_before_the_step_changes_no_partial_gradient() -> None:
    """The upper loss depends on the second parameter directly only, so its hypergradient is a partial gradient."""
    slopes = []
    for factor in (1.0, 0.5):
        inner, _, x = pair(ridge_hpo())
        z = torch.ones(1, requires_grad=True)
        meta: Any = UpperStep([x, z], lower=inner.lower)

        def scale(*_: Any, z: Tensor = z, factor: float = factor) -> None:
            assert z.grad is not None
            z.grad.mul_(factor)

        meta.optimizer.register_step_pre_hook(scale)
        inner.solve()
        meta.step(lambda: inner.val() + z.square().sum())
        slopes.append(meta.record.slope)
    assert slopes[0] - slopes[1] == pytest.approx(4.0 - 2.0)  # <f_z, d> with f_z = 2 and d = 2 or 1


@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
@pytest.mark.parametrize(
    "part",
    [lambda x: x.exp().sum(), lambda x: x.sum(), lambda x: (x[0] + 0.0).detach() + x[1]],
    ids=["saves", "saves nothing", "detached in part"],
)
def test_any_part_from_before_a_search_is_refused(make: Any, part: Any) -> None:
    """Also one that saves nothing, of which a second backward would not complain; then the solution still holds."""
    inner, meta, x = make(ridge_hpo())
    inner.solve()
    early = part(x)
    before = snapshot(x, x.grad, meta.state_dict())
    with pytest.raises(ClosureError, match=r"computed before step\(\)"):
        meta.step(lambda: inner.val() + early)
    assert snapshot(x, x.grad, meta.state_dict()) == before
    meta.step(inner.val)
    assert meta.record.moved


def test_a_part_from_before_that_depends_on_no_upper_parameter_is_a_constant() -> None:
    inner, meta, _ = pair(ridge_hpo())
    weight = torch.ones(1, requires_grad=True)
    inner.solve()
    penalty = weight.exp().sum()
    meta.step(lambda: inner.val() + penalty)
    assert meta.record.moved


def test_a_loss_of_another_thread_is_not_one_from_before() -> None:
    """Numbers of nodes begin anew in each thread."""
    inner, meta, _ = pair(ridge_hpo())
    other, meta2, _ = pair(ridge_hpo())

    def closure() -> Tensor:
        found: list[Tensor] = []
        with_graph = torch.is_grad_enabled()

        def compute() -> None:
            with torch.set_grad_enabled(with_graph):
                found.append(inner.val())

        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        return found[0]

    for _ in range(3):
        iterate(inner, meta, closure)
        iterate(other, meta2)
    assert torch.equal(inner.x, other.x)


@pytest.mark.parametrize("rule", [BiSLS, BiSPS])
@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
def test_after_a_closure_that_raises_the_solution_still_holds(make: Any, rule: Any) -> None:
    ends = []
    for fails in (False, True):
        inner, meta, x = make(ridge_hpo(), rule=rule)
        inner.solve()
        if fails:
            grad_fn = inner.y.grad_fn
            with pytest.raises(ZeroDivisionError):
                meta.step(lambda: inner.val() / 0 + 1 // 0)
            with pytest.raises(HypergradientError, match="no meta-parameter"):
                meta.step(lambda: torch.ones(1, requires_grad=True).sum())
            assert inner.y.grad_fn is grad_fn and x.grad is None
        meta.step(inner.val)
        ends.append([x.detach(), x.grad, inner.y.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_paper_s_search_takes_one_more_lower_step() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    inner = implicit_module(EXACT_CG)(x, problem).automatic()
    meta: Any = UpperStep([x], OneStepBiSLS, 10.0, lower=inner.lower, direction="adam", baseline="matched")
    iterate(inner, meta)
    # With "matched" one value more than trials; one lower gradient for each, and none for a tangent.
    assert meta.evaluations.lower.gradients == meta.evaluations.upper.values == meta.record.trials + 1
    assert meta.evaluations.lower.hvps == 0
