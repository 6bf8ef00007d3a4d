"""Step sizes as TorchOpt's GradientTransformations, and as its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import adaptive_bilevel as ab
from adaptive_bilevel import policies
from adaptive_bilevel.errors import ClosureError, LowerLevelError, NonFiniteError, OptionError, TensorError
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

Tree = dict[str, Tensor]

SCALES = torch.tensor([1.0, 10.0], dtype=torch.float64)


def loss(params: Any) -> Tensor:
    """Two leaves, not quadratic."""
    return (SCALES * params["a"].square()).sum() + torch.cosh(params["b"] - params["a"].sum()).sum() - 1.0


def start() -> Tree:
    return {
        "a": torch.tensor([1.5, -0.7], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True),
    }


def gradients(params: Any) -> tuple[Tensor, Tree]:
    value = loss(params)
    return value, dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))


def descend(optimizer: Any, steps: int, *, inplace: bool = False, at: Any = None) -> tuple[list[float], Tree, Any]:
    losses: list[float] = []
    params, state = at or (start(), None)
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        value, grad = gradients(params)
        losses.append(float(value.detach()))
        updates, state = optimizer.update(
            grad, state, params=params, inplace=inplace, value=value, grad=grad, value_fn=loss
        )
        params = torchopt.apply_updates(params, updates, inplace=inplace)
        params = {k: p.detach().requires_grad_() for k, p in params.items()}
    return losses, params, state


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


# ------------------------------------------------------------------------------------------ a learning rate of its own


def test_polyak_steps_through_stock_chains_and_optimizers() -> None:
    """One step for all leaves, and the same steps as the core's."""
    params, params2, params3 = start(), start(), start()
    reference = ab.SPSB(list(params3.values()), 0.3)
    lr = PolyakLR(policies.SPSB(bound=0.3))
    optimizer = torchopt.SGD(list(params.values()), lr=lr)
    lr2 = PolyakLR(policies.SPSB(bound=0.3))
    functional = torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=1e9), torchopt.sgd(lr=lr2))
    state = functional.init(params2)
    for _ in range(6):
        value = loss(params)
        optimizer.zero_grad()
        value.backward()
        lr.tell(value, [p.grad for p in params.values()])
        optimizer.step()
        value2, grad2 = gradients(params2)
        lr2.tell(value2, grad2)
        updates, state = functional.update(grad2, state, params=params2, inplace=False)
        params2 = {k: p.detach().requires_grad_() for k, p in torchopt.apply_updates(params2, updates).items()}
        reference.step(lambda: loss(params3))
    for a, b, c in zip(params.values(), params2.values(), params3.values(), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-15)
    other = PolyakLR(policies.SPSB(bound=0.3))
    other.load_state_dict(lr.state_dict())
    for each in (lr, other):
        each.tell(1.0, [torch.ones(2)])
    assert float(lr(0)) == float(other(0))


def test_an_update_that_was_told_nothing_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    lr = PolyakLR()
    optimizer = torchopt.SGD([x], lr=lr)
    x.square().sum().backward()
    with pytest.raises(LowerLevelError, match="tell"):
        optimizer.step()
    lr.tell(x.square().sum(), [x.grad])
    optimizer.step()
    with pytest.raises(LowerLevelError, match="update 1 was not told"):
        optimizer.step()


@pytest.mark.parametrize("rule", ["spsb", "decsps", "spsb, differentiable", "sls"])
@pytest.mark.parametrize("where", ["loss", "gradient", "direction", "overflow"])
def test_a_loss_that_is_not_finite_is_refused(where: str, rule: str) -> None:
    """TorchOpt multiplies, and 0 times NaN is NaN."""
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    policy: Any = {"sls": policies.SLS(start=0.3), "decsps": policies.DecSPS(bound=0.3)}.get(
        rule, policies.SPSB(bound=0.3)
    )
    lr = PolyakLR(policy, differentiable="differentiable" in rule)
    options: Any = {"trial": lambda step: 0.0} if rule == "sls" else {}
    optimizer = torchopt.SGD([x], lr=lr)
    for good in (True, False, True):
        at, before = x.detach().clone(), (lr.state_dict(), lr.record)
        value = x.square().sum()
        optimizer.zero_grad()
        value.backward()
        grad: Any = x.grad
        bad = torch.full_like(grad, 1e200 if where == "overflow" else float("nan"))
        told: Any = {"loss": [value * float("nan"), [grad]], "direction": [value, [grad], [bad]]}.get(
            where, [value, [bad]]
        )
        if not good:
            with pytest.raises(NonFiniteError, match=r"PolyakLR\.tell.*not finite.*skip this update"):
                lr.tell(*told, **options)
            assert (lr.state_dict(), lr.record) == before
            with pytest.raises(LowerLevelError, match="was not told"):
                optimizer.step()
            assert torch.equal(x, at)
        else:
            lr.tell(value, [grad], **options)
            optimizer.step()
            assert bool(x.isfinite().all()) and not torch.equal(x, at)


def test_gradients_and_directions_are_paired_leaf_by_leaf() -> None:
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0])
    lr = PolyakLR(policies.SPSMax())
    lr.tell(1.0, {"a": None, "b": b, "c": c}, {"a": a, "b": a, "c": None})
    assert lr.record is not None and float(lr.record.slope) == float(a @ b)
    optimizer = scale_by_spsmax()
    for grads, along in (([a], [a, b]), ([a, b], [a]), ([a], [c])):
        with pytest.raises(TensorError, match=r"PolyakLR\.tell.*shapes.*one for each"):
            lr.tell(1.0, grads, along)
        with pytest.raises(TensorError, match=r"scale_by_spsmax.*shapes.*one for each"):
            optimizer.update(along, optimizer.init(along), params=along, value=1.0, grad=grads)


def test_a_search_may_be_told_its_trials() -> None:
    x = torch.tensor([3.0, 2.0], requires_grad=True)
    lr = PolyakLR(policies.SLS(start=10.0))
    optimizer = torchopt.SGD([x], lr=lr)
    value = (x**2).sum()
    value.backward()
    assert x.grad is not None
    grad = x.grad.clone()
    lr.tell(value, [grad], trial=lambda step: float(((x.detach() - step * grad) ** 2).sum()))
    optimizer.step()
    assert lr.record is not None and lr.record.trials > 1
    assert (x**2).sum() < value


# ------------------------------------------------------------------------------------------ unrolled differentiation

RULES: dict[str, Any] = {
    "spsmax": policies.SPSMax(bound=10.0),
    "spsmax at its bound": policies.SPSMax(bound=1e-2),
    "spsb": policies.SPSB(bound=0.08),
    "decsps": policies.DecSPS(bound=0.5),
    "envelope": policies.Envelope(bound=1.0, floor=1e-3, c=4.0),
    "envelope at its floor": policies.Envelope(bound=1.0, floor=0.3),
    "envelope at its bound": policies.Envelope(bound=0.05, floor=0.01),
    "found": policies.SPSMax(),
}


def unroll(
    policy: Any, x: Tensor, differentiable: bool, fixed: list[float] | None = None
) -> tuple[Tensor, list[float]]:
    """A validation loss after four lower steps from x, and the steps; `fixed` are taken in the place of the rule's."""
    y: tuple[Tensor, ...] = (x * 1.0,)
    optimizer: Any = FuncOptimizer(chain(torchopt.sgd(lr=1.0), scale_by_policy(policy, differentiable=differentiable)))
    steps = []
    for k in range(4):
        lower = 0.5 * (SCALES * (y[0] - x.sin()).square()).sum() + 0.05 * x.exp().sum() * y[0].square().sum()
        if fixed is None:
            y = optimizer.step(lower, y)
            steps.append(float(optimizer.optim_state[1].record.step_size))
        else:
            (grad,) = torch.autograd.grad(lower, y, create_graph=True)
            y = (y[0] - fixed[k] * grad,)
    return (y[0] - 0.3).square().sum() + x.square().sum(), steps


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_the_gradient_through_a_polyak_step_is_that_of_finite_differences(name: str, differentiable: bool) -> None:
    policy, h = RULES[name], 1e-6
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    value, steps = unroll(policy, x, differentiable)
    (gradient,) = torch.autograd.grad(value, x)
    fixed = None if differentiable else steps
    numerical = []
    for e in torch.eye(2, dtype=torch.float64) * h:
        ends = [unroll(policy, (x.detach() + s * e).requires_grad_(), differentiable, fixed)[0] for s in (1, -1)]
        numerical.append(float((ends[0] - ends[1]).detach()) / (2 * h))
    assert gradient.tolist() == pytest.approx(numerical, rel=1e-5, abs=1e-7)


def test_constant_and_differentiable_steps_have_different_gradients() -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    ends = [torch.autograd.grad(unroll(RULES["spsmax"], x, d)[0], x)[0] for d in (False, True)]
    assert (ends[0] - ends[1]).norm() > 0.05 * ends[0].norm()


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_learning_rate_is_differentiable_on_request(differentiable: bool) -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    lr = PolyakLR(policies.SPSMax(bound=10.0), differentiable=differentiable)
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=lr))
    y: tuple[Tensor, ...] = (x * 1.0,)
    lower = 0.5 * (SCALES * (y[0] - x.sin()).square()).sum()
    lr.tell(lower, torch.autograd.grad(lower, y, create_graph=True))
    y = optimizer.step(lower, y)
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    assert lr.record is not None
    step = float(lr.record.step_size)
    if differentiable:

        def end(x: Tensor) -> Tensor:
            residual = SCALES * (x - x.sin())
            return x - 0.5 * (residual * (x - x.sin())).sum() / residual.square().sum() * residual

    else:

        def end(x: Tensor) -> Tensor:
            return x - step * SCALES * (x - x.sin())

    # y starts at x, so the whole step is a function of x.
    expected = torch.func.grad(lambda x: end(x).sum())(x.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_unrolled_loops_go_on_after_an_outer_iteration(name: str, differentiable: bool) -> None:
    """MetaSGD with a Polyak learning rate; its state is cut from the graph as TorchOpt's is."""
    x = torch.tensor([0.9, -0.4], dtype=torch.float64)
    h = 1e-6

    def outer(x: Tensor, iterations: int, steps: list[float] | None = None) -> tuple[Tensor, list[float]]:
        net = torch.nn.Linear(2, 1, bias=False).double()
        net.weight.data.fill_(0.3)
        rates, taken = iter(steps or []), []
        lr: Any = PolyakLR(RULES[name], differentiable=differentiable) if steps is None else lambda _: next(rates)
        optimizer = torchopt.MetaSGD(net, lr=lr)
        value = torch.zeros(())
        for _ in range(iterations):
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(optimizer)
            if steps is None:
                lr.stop_gradient()
            for _ in range(2):
                y = net.weight[0]
                loss = 0.5 * (SCALES * (y - x.sin()).square()).sum() + 0.05 * x.exp().sum() * y.square().sum()
                if steps is None:
                    lr.tell(loss, torch.autograd.grad(loss, list(net.parameters()), create_graph=True))
                    taken.append(float(lr.record.step_size))
                optimizer.step(loss)
            value = (net.weight - 0.3).square().sum() + x.square().sum()
            if iterations > 1:
                torch.autograd.grad(value, x)  # frees the graph
        return value, taken

    outer(x.clone().requires_grad_(), 3)
    at = x.clone().requires_grad_()
    value, fixed = outer(at, 1)
    (gradient,) = torch.autograd.grad(value, at)
    numerical = []
    for e in torch.eye(2, dtype=torch.float64) * h:
        ends = [outer((x + s * e).requires_grad_(), 1, None if differentiable else fixed)[0] for s in (1, -1)]
        numerical.append(float((ends[0] - ends[1]).detach()) / (2 * h))
    assert gradient.tolist() == pytest.approx(numerical, rel=1e-5, abs=1e-7)


def test_functional_state_is_cut_as_torchopt_s_is() -> None:
    x = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer: Any = FuncOptimizer(chain(torchopt.sgd(lr=1.0), scale_by_policy(RULES["decsps"], differentiable=True)))
    for _ in range(3):
        y: Any = (x * 1.0,)
        for _ in range(2):
            y = optimizer.step(0.5 * (SCALES * (y[0] - x.sin()).square()).sum(), y)
        torch.autograd.grad(y[0].sum(), x)
        torchopt.stop_gradient(optimizer.optim_state)
