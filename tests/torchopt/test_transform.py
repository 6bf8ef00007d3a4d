"""Step sizes as TorchOpt's GradientTransformations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import adaptive_bilevel as ab
from adaptive_bilevel import policies
from adaptive_bilevel.errors import AdaptiveBilevelWarning, ClosureError, OptionError
from adaptive_bilevel.policies import Outcome
from adaptive_bilevel_torchopt import (
    FuncOptimizer,
    PolyakLR,
    ScaleByPolicyState,
    chain,
    decsps,
    scale_by_policy,
    scale_by_sls,
    scale_by_spsb,
    scale_by_spsmax,
    sls,
    slsb,
    spsb,
    spsmax,
)
from tests.torchopt.trees import descend, gradients, loss, start

# The optimizers of the core by the same rules.
ALIASES: dict[str, tuple[Callable[..., Any], Any]] = {
    "spsmax": (spsmax, ab.SPSMax),
    "decsps": (decsps, ab.DecSPS),
    "spsb": (spsb, ab.SPSB),
    "sls": (sls, ab.SLS),
    "slsb": (slsb, ab.SLSB),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("lr", [None, 0.05])
@pytest.mark.parametrize("name", ALIASES)
def test_the_aliases_are_the_optimizers(name: str, lr: float | None, inplace: bool) -> None:
    alias, optimizer = ALIASES[name]
    losses, _, _ = descend(alias(lr), 12, inplace=inplace)
    params = start()
    reference = optimizer(list(params.values()), lr)
    expected = [float(reference.step(lambda: loss(params)).detach()) for _ in range(12)]
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[-1] < losses[0]


def test_a_transformation_chains_with_those_of_torchopt() -> None:
    optimizer = chain(
        torchopt.clip.clip_grad_norm(max_norm=1.0),
        torchopt.adam(lr=1.0, weight_decay=1e-3),
        chain(scale_by_sls()),
    )
    losses, _, state = descend(optimizer, 40)
    assert losses[-1] < 1e-2 * losses[0]
    record = state[-1][0].record
    assert record.trials >= 1 and record.slope > 0.0


def test_the_slope_is_that_of_the_updates_against_the_gradients() -> None:
    params = start()
    value, grad = gradients(params)
    optimizer = chain(torchopt.adam(lr=1.0), scale_by_spsmax())
    updates, _ = torchopt.adam(lr=1.0).update(grad, torchopt.adam(lr=1.0).init(params), params=params, inplace=False)
    expected = -sum(float((grad[k] * updates[k]).sum()) for k in grad)
    _, state = optimizer.update(grad, optimizer.init(params), params=params, inplace=False, value=value, grad=grad)
    assert float(state[1].record.slope) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [scale_by_spsmax, scale_by_sls])
@pytest.mark.parametrize("inplace", [False, True])
def test_updates_that_ascend_or_are_not_finite_leave_as_zeros(scale: Any, inplace: bool) -> None:
    params = start()
    value, grad = gradients(params)
    optimizer = scale()
    for made, outcome in (
        ({k: g.clone() for k, g in grad.items()}, Outcome.no_descent),
        ({k: torch.full_like(g, float("nan")) for k, g in grad.items()}, Outcome.non_finite),
    ):
        updates, state = optimizer.update(
            made, optimizer.init(params), params=params, inplace=inplace, value=value, grad=grad, value_fn=loss
        )
        assert all(not bool(u.any()) for u in updates.values())
        assert int(state.record.outcome) == outcome
        assert (updates["a"] is made["a"]) == inplace


@pytest.mark.parametrize("factor", [0.0, float("nan")])
@pytest.mark.parametrize("rule", [spsmax, spsb, decsps, slsb])
def test_the_first_step_that_can_move_tries_its_bound(rule: Any, factor: float) -> None:
    """x^2 / (1 + x^2) is flat far out, where a bound that nothing was tried for is beyond the minimizer by far."""
    params = {"x": torch.tensor(1e3, dtype=torch.float64, requires_grad=True)}
    optimizer, trials = rule(), []
    state = optimizer.init(params)
    for times in (factor, factor, 1.0, 1.0):
        flat = lambda at, w=times: w * at["x"].square() / (1.0 + at["x"].square())  # noqa: E731
        value = flat(params)
        grad = {"x": torch.autograd.grad(value, params["x"])[0]}
        updates, state = optimizer.update(
            grad, state, params=params, inplace=False, value=value, grad=grad, value_fn=flat
        )
        moved = torchopt.apply_updates(params, updates, inplace=False)
        trials.append(int(state[1].record.trials))
        if trials[-1] and len(trials) == 3:
            assert float(flat(moved).detach()) <= float(value.detach())
        params = {"x": moved["x"].detach().requires_grad_()}
    assert trials[:2] == [0, 0] and trials[2] > 1
    assert (trials[3] > 0) is (rule is slsb)


# What else may stand in a chain with a step size, before it and after it.
MEMORIES: dict[str, tuple[Any, ...]] = {
    "adam": (torchopt.adam(lr=1.0), scale_by_spsmax(0.1)),
    "momentum": (torchopt.sgd(lr=1.0, momentum=0.9), scale_by_sls()),
    "momentum, Polyak": (torchopt.sgd(lr=1.0, momentum=0.9), scale_by_spsb(0.1)),
    "decay, radam": (torchopt.radam(lr=1.0, weight_decay=1e-2), scale_by_sls()),
    "after": (torchopt.sgd(lr=1.0), scale_by_spsb(0.1), torchopt.transform.trace(momentum=0.9)),
    "decay after": (torchopt.sgd(lr=1.0), scale_by_sls(), torchopt.transform.add_decayed_weights(1e-3)),
    "nested": (chain(chain(torchopt.adam(lr=1.0)), chain(scale_by_spsmax(0.01))), torchopt.transform.trace(0.5)),
}


def of_policy(state: Any) -> bool:
    return isinstance(state, ScaleByPolicyState)


def memories(state: Any) -> list[Any]:
    """The leaves of a chain's state but for the records."""
    without = lambda s: s._replace(record=None) if of_policy(s) else s  # noqa: E731
    leaves = torchopt.pytree.tree_leaves(torchopt.pytree.tree_map(without, state, is_leaf=of_policy))
    return [t.clone() if isinstance(t, Tensor) else t for t in leaves]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient", "both"])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_loss_that_is_not_finite_leaves_no_trace_in_a_chain(name: str, where: str, inplace: bool) -> None:
    optimizer = chain(*MEMORIES[name])
    _, params, state = descend(optimizer, 3, inplace=inplace)
    before = memories(state)
    value, grad = gradients(params)
    if where != "gradient":
        value = value * float("nan")
    if where != "loss":
        grad = {k: g * float("nan") for k, g in grad.items()}
    updates, after = optimizer.update(
        grad, state, params=params, inplace=inplace, value=value, grad=grad, value_fn=loss
    )
    assert not any(bool(u.any()) for u in updates.values())
    for kept in (memories(after), memories(state)):
        torch.testing.assert_close(kept, before, rtol=0.0, atol=0.0)
    policy = filter(of_policy, torchopt.pytree.tree_leaves(after, is_leaf=of_policy))
    assert [int(s.record.outcome) for s in policy] == [Outcome.non_finite]
    losses, _, _ = descend(optimizer, 40, inplace=inplace, at=(params, after))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("cause", ["no loss", "no gradients", "an error of the loss"])
def test_an_update_that_is_refused_changes_nothing_in_place(cause: str) -> None:
    optimizer = chain(torchopt.sgd(lr=1.0, momentum=0.9), scale_by_sls())
    _, params, state = descend(optimizer, 2, inplace=True)
    value, grad = gradients(params)
    given: Any = {
        "value": value,
        "grad": grad,
        "value_fn": loss if cause != "an error of the loss" else lambda p: 1 / 0,
    }
    given.pop({"no loss": "value", "no gradients": "grad"}.get(cause), None)
    before = memories((state, grad))
    with pytest.raises((ClosureError, ZeroDivisionError)):
        optimizer.update(grad, state, params=params, inplace=True, **given)
    torch.testing.assert_close(memories((state, grad)), before, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("part", [torchopt.adam(lr=1.0), torchopt.sgd(lr=1.0, momentum=0.9)], ids=["adam", "momentum"])
def test_a_batch_of_problems_skips_those_whose_loss_is_not_finite(part: Any) -> None:
    optimizer = chain(part, scale_by_spsb(0.1))

    def step(x: Tensor, memory: Any, factor: Tensor) -> Any:
        value, grad = (t * factor for t in (x.square().sum(), 2 * x))
        state = (memory, ScaleByPolicyState(policies.SPSB(bound=0.1).init()))
        updates, after = optimizer.update([grad], state, params=[x], inplace=False, value=value, grad=[grad])
        return updates[0], tuple(torchopt.pytree.tree_leaves(after[0])), after[1].record.outcome

    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    _, memory = part.update([x], part.init([x]), params=[x], inplace=False)
    factors = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    stacked = torchopt.pytree.tree_map(lambda t: t.expand(3, *t.shape).clone(), memory)
    batched = torch.vmap(step, in_dims=(None, 0, 0))(x, stacked, factors)
    for k, factor in enumerate(factors):
        alone = step(x, memory, factor)
        mine = torchopt.pytree.tree_map(lambda t, k=k: t[k], batched)
        torch.testing.assert_close(mine, alone, rtol=1e-12, atol=0.0)
        assert (int(alone[2]) == Outcome.non_finite) == (k == 1) == (not bool(alone[0].any()))


def test_parameters_without_a_gradient_pass() -> None:
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = FuncOptimizer(spsmax())
    after = optimizer.step(params[0].square().sum(), params)
    assert torch.equal(after[1], params[1]) and after[0].abs().max() < 1.0


def test_func_optimizer_steps_where_the_loss_is_known() -> None:
    searched = FuncOptimizer(sls())
    params: Any = tuple(start().values())
    as_tree = lambda p: loss({"a": p[0], "b": p[1]})  # noqa: E731
    first = float(as_tree(params).detach())
    for _ in range(30):
        params = searched.step(as_tree(params), params, value_fn=as_tree)
        params = tuple(p.detach().requires_grad_() for p in params)
    assert float(as_tree(params).detach()) < 1e-3 * first
    state = searched.state_dict()
    other = FuncOptimizer(sls())
    other.load_state_dict(state)
    ends = [o.step(as_tree(params), params, value_fn=as_tree) for o in (searched, other)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    plain = FuncOptimizer(torchopt.sgd(lr=0.01))  # a transformation that takes no loss
    plain.step(as_tree(params), params)


def test_what_drops_the_loss_is_told_the_way_out() -> None:
    params = start()
    value, grad = gradients(params)
    stock = torchopt.chain(torchopt.sgd(lr=1.0), scale_by_spsb())
    with pytest.raises(ClosureError, match=r"value, grad.*torchopt\.chain.*PolyakLR"):
        stock.update(grad, stock.init(params), params=params)
    with pytest.raises(ClosureError, match="value"):
        torchopt.FuncOptimizer(spsb()).step(loss(params), tuple(params.values()))
    with pytest.raises(ClosureError, match="value_fn"):
        scale_by_sls().update(grad, scale_by_sls().init(params), params=params, value=value, grad=grad)
    with pytest.raises(TypeError, match="nonsense"):
        chain(scale_by_spsb()).update(grad, chain(scale_by_spsb()).init(params), nonsense=1)  # type: ignore[call-arg]


def wrong(argument: Any) -> Any:
    return argument


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: scale_by_policy(wrong(policies.SLS)), "pass a policy"),
        (lambda: scale_by_policy(policies.SLS(), differentiable=True), "piecewise constant"),
        (lambda: scale_by_spsb(-1.0), "bound"),
        (lambda: PolyakLR(wrong(policies.SPSB)), r"PolyakLR\(policy=.*pass a policy"),
        (lambda: PolyakLR(wrong(0.1)), r"PolyakLR\(policy=0.1\).*pass a policy"),
        (lambda: PolyakLR(policies.SLS(), differentiable=True), "piecewise constant"),
        (lambda: chain(wrong(scale_by_spsb)), "GradientTransformations"),
    ],
)
def test_wrong_options_are_refused(make: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        make()


@pytest.mark.parametrize(("kind", "said"), [("changes", "at the same point"), ("stays", "does not depend on")])
@pytest.mark.parametrize("rule", ["sls", "slsb"])
def test_a_loss_that_is_no_function_of_the_parameters_is_named(rule: str, kind: str, said: str) -> None:
    draws = torch.rand(97, generator=torch.Generator().manual_seed(0)).mul(4.0).exp().tolist()
    noise, optimizer, params = itertools.cycle(draws), ALIASES[rule][0](), start()
    state = optimizer.init(params)
    with pytest.warns(AdaptiveBilevelWarning, match=said):
        for _ in range(60):
            value = next(noise) * loss(params)

            def at(tree: Any, value: Tensor = value) -> Tensor:
                return value if kind == "stays" else next(noise) * loss(tree)

            grad = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
            updates, state = optimizer.update(
                grad, state, params=params, value=value, grad=grad, value_fn=at, inplace=False
            )
            params = {name: (p + updates[name]).detach().requires_grad_() for name, p in params.items()}
