"""Conduct of the single-level optimizers: options, groups, schedulers, saved state, directions."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adaptive_bilevel import SLS, SLSB, SPSB, DecSPS, SPSMax
from adaptive_bilevel.errors import (
    AdaptiveBilevelWarning,
    ClosureError,
    NonFiniteError,
    OptionError,
    TensorError,
)
from adaptive_bilevel.policies import Outcome
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    closure_of,
    every_class,
    every_optimizer,
    every_polyak,
    every_search,
    net,
    plain,
    run,
    snapshot,
)


def quadratic(x: Tensor) -> Tensor:
    return (torch.linspace(1.0, 4.0, x.numel()) * x.flatten() ** 2).sum()


def leaf(*values: float, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (3.0, 2.0), dtype=dtype))


# ------------------------------------------------------------------------------------------------ it optimizes


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_decreases_the_loss(info: OptimizerInfo, lr: float | None) -> None:
    x = leaf()
    optimizer = info.make([x], lr)
    first = float(optimizer.step(lambda: quadratic(x)))
    for _ in range(100):
        last = float(optimizer.step(lambda: quadratic(x)))
    assert last < 0.2 * first
    assert optimizer.record.step_size == optimizer.param_groups[0]["step_size"] > 0.0
    assert optimizer.record.describe().startswith("step ")


@every_optimizer
def test_trains_a_network(info: OptimizerInfo) -> None:
    model = net(dropout=0.0)
    losses = run(info.make(model.parameters(), None), model, batches(1) * 40)
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------------ lr and schedulers


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_lr_is_a_number_from_construction_on(info: OptimizerInfo, lr: float | None) -> None:
    optimizer = info.make([leaf()], lr)
    assert optimizer.param_groups[0]["lr"] == (lr or 1.0)
    for scheduler in (
        lr_scheduler.StepLR(optimizer, 1),
        lr_scheduler.LambdaLR(optimizer, lambda k: 1.0),
        lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10),
        lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ):
        optimizer.step(lambda: quadratic(optimizer.param_groups[0]["params"][0]))
        scheduler.step()
        assert math.isfinite(optimizer.param_groups[0]["lr"])


@every_class
@pytest.mark.parametrize("lr", [1e-4, None])
def test_a_scheduler_scales_the_bound(info: OptimizerInfo, lr: float | None) -> None:
    if info.cls is SLS:
        pytest.skip("lr is the first trial only")
    options: dict[str, Any] = {} if info.searches or info.cls is DecSPS else {"decay": "constant"}
    bounds = []
    for factor in (1.0, 0.5):
        x = leaf()
        optimizer = info.make([x], lr, lower_bound=-50.0, **options)  # far below: the bound is what acts
        scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=factor)
        for _ in range(4):
            optimizer.step(lambda: quadratic(x))
            scheduler.step()
        optimizer.step(lambda: quadratic(x))
        bounds.append(optimizer.record.bound)
    if info.cls in (DecSPS, SLSB) and lr is None:
        assert bounds[1] < 0.5 * bounds[0]
    else:
        assert bounds[1] == pytest.approx(0.25 * bounds[0])


def test_a_scheduler_scales_the_first_trial_of_sls() -> None:
    for lr, x in ((0.1, leaf()), (None, leaf())):
        optimizer: Any = SLS([x], lr, reset="initial", lower_bound=0.0)
        scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=1e-3)
        optimizer.step(lambda: quadratic(x))
        scheduler.step()
        optimizer.step(lambda: quadratic(x))
        scale = optimizer.param_groups[0]["scale"]
        assert optimizer.record.step_size == pytest.approx(1e-3 * (lr or 1.0) * scale, rel=1e-12)


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_warm_up_starts_at_zero(info: OptimizerInfo, lr: float | None) -> None:
    x = leaf()
    optimizer = info.make([x], lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: min(k / 2, 1.0))
    before = plain(optimizer.state_dict()["state"])
    optimizer.step(lambda: quadratic(x))
    assert x.tolist() == [3.0, 2.0]
    assert optimizer.record.step_size == 0.0
    assert plain(optimizer.state_dict()["state"]) == before
    scheduler.step()
    optimizer.step(lambda: quadratic(x))
    assert optimizer.record.step_size > 0.0
    full, y = info.make([leaf()], lr), x
    y = full.param_groups[0]["params"][0]
    full.step(lambda: quadratic(y))
    if info.cls is not SLS:
        assert optimizer.record.bound == pytest.approx(0.5 * full.record.bound)


def test_one_cycle_moves_beta1() -> None:
    x = leaf()
    optimizer = SPSB([x], 0.1, direction="adam")
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.7)
    optimizer.step(lambda: quadratic(x))
    gradient = 2 * torch.tensor([1.0, 4.0]) * torch.tensor([3.0, 2.0])
    torch.testing.assert_close(optimizer.state[x]["direction"]["exp_avg"], gradient * (1 - 0.7))


# ------------------------------------------------------------------------------------------------ groups


@every_optimizer
def test_groups_share_one_step(info: OptimizerInfo) -> None:
    x, y = leaf(3.0, 2.0), leaf(1.0, -1.0, 0.5)
    optimizer = info.make([{"params": [x]}, {"params": [y], "lr": 0.025}], 0.1)
    reference = {p: p.detach().clone() for p in (x, y)}
    gradients = {p: torch.autograd.grad(quadratic(p), p)[0] for p in (x, y)}
    optimizer.step(lambda: quadratic(x) + quadratic(y))
    step = optimizer.record.step_size
    adam = info.options.get("direction") == "adam"
    directions = {p: g / (g.abs() + 1e-8) if adam else g for p, g in gradients.items()}
    slope = sum(w * float(gradients[p].flatten() @ directions[p].flatten()) for p, w in ((x, 1.0), (y, 0.25)))
    assert optimizer.record.slope == pytest.approx(slope)
    torch.testing.assert_close(x.detach(), reference[x] - step * directions[x])
    torch.testing.assert_close(y.detach(), reference[y] - step * 0.25 * directions[y])
    assert [g["step_size"] for g in optimizer.param_groups] == [step, step * 0.25]


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_groups_of_equal_lr_are_one_group(info: OptimizerInfo, lr: float | None) -> None:
    one, two = net(dropout=0.0), net(dropout=0.0)
    optimizers = [
        info.make(one.parameters(), lr),
        info.make([{"params": list(two.first.parameters())}, {"params": [*two.norm.parameters()]}], lr),
    ]
    optimizers[1].add_param_group({"params": list(two.second.parameters())})
    for model, optimizer in zip((one, two), optimizers, strict=True):
        run(optimizer, model, batches(5))
    assert plain(one.state_dict()) == plain(two.state_dict())


@every_optimizer
def test_a_group_without_lr_has_that_of_the_first(info: OptimizerInfo) -> None:
    optimizer = info.make([{"params": [leaf()], "lr": 0.5}, {"params": [leaf()]}], None)
    assert [(g["lr"], g["scale"]) for g in optimizer.param_groups] == [(0.5, 1.0), (0.5, 1.0)]


@every_optimizer
def test_add_param_group_later(info: OptimizerInfo) -> None:
    x, y = leaf(), leaf(1.0)
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    optimizer.add_param_group({"params": [y]})
    assert optimizer.param_groups[1]["scale"] == optimizer.param_groups[0]["scale"] > 0.0
    for _ in range(3):
        optimizer.step(lambda: quadratic(x) + quadratic(y))
    assert y.item() != 1.0


@every_optimizer
def test_empty_groups(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([{"params": []}, {"params": [x]}])
    optimizer.step(lambda: quadratic(x))
    assert optimizer.record.step_size > 0.0


@every_class
@pytest.mark.parametrize(
    "group",
    [
        {"c": 0.2},
        {"lr": -1.0},
        {"lr": math.nan},
        {"direction": "adam"},
        {"lower_bound": 1.0},
        {"eps": 1e-3},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
    ],
    ids=lambda g: str(next(iter(g.items()))),
)
def test_a_group_may_only_differ_in_lr(info: OptimizerInfo, group: dict[str, Any]) -> None:
    optimizer = info.make([leaf()])
    before = plain(optimizer.state_dict())
    with pytest.raises(OptionError, match=next(iter(group))):
        optimizer.add_param_group({"params": [leaf()], **group})
    assert plain(optimizer.state_dict()) == before


@every_class
def test_unsupported_parameters_are_refused(info: OptimizerInfo) -> None:
    optimizer = info.make([leaf()])
    bad = [nn.Parameter(torch.zeros(2, dtype=torch.complex64)), nn.Parameter(torch.eye(2).to_sparse())]
    bad.append(nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    for p in bad:
        with pytest.raises(TensorError, match="only dense real floating-point"):
            info.make([p])
        with pytest.raises(TensorError):
            optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


# ------------------------------------------------------------------------------------------------ options

SHARED: dict[str, list[Any]] = {
    "lr": [0.0, -1.0, math.nan, "fast", True],
    "c": [0.0, -1.0, math.nan, "1"],
    "lower_bound": [math.inf, math.nan, "0"],
    "direction": ["lbfgs", None, 1],
    "betas": [(0.9,), (1.0, 0.999), (0.9, -0.1), 0.9, "ab", (0.9, "b"), (math.nan, 0.9)],
    "eps": [-1e-8, math.nan, None, math.inf],
    "max_skips": [0, -1, 1.5, None, True],
}
OWN: dict[type, dict[str, list[Any]]] = {
    SPSMax: {"decay": ["sqrt", None], "floor": [-1.0, math.inf, math.nan], "floor_decay": ["fast"]},
    SPSB: {"decay": ["sqrt", 2], "floor": [-0.1], "floor_decay": [None]},
    DecSPS: {},
    SLS: {
        "c": [1.0, 1.5],
        "shrink": [0.0, 1.0, 2.0, math.nan],
        "grow": [0.9, math.inf, math.nan, "2"],
        "reset": ["often", 1, None],
        "slack": [-1.0, math.inf],
        "max_step": [0.0, -1.0, math.nan],
        "max_trials": [0, 1.5, -3],
        "lr": [math.inf],
    },
    SLSB: {"shrink": [1.0], "grow": [0.5], "reset": ["x"], "slack": [math.nan], "max_trials": [0], "decay": ["x"]},
}


def nonsense() -> list[Any]:
    cases = []
    for cls, own in OWN.items():
        for table in (SHARED, own):
            cases += [
                pytest.param(cls, name, v, id=f"{cls.__name__}({name}={v!r})") for name in table for v in table[name]
            ]
    return cases


@pytest.mark.parametrize(("cls", "name", "value"), nonsense())
def test_wrong_options_are_named(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\({name}=.*: .*{name} must") as caught:
        cls([leaf()], **{name: value})
    assert isinstance(caught.value, OptionError)
    assert repr(value) in str(caught.value)


@every_class
def test_unknown_keywords_raise(info: OptimizerInfo) -> None:
    with pytest.raises(TypeError, match="momentum"):
        info.cls([leaf()], momentum=0.9)


@every_class
def test_without_lr_and_lower_bound_nothing_can_be_found(info: OptimizerInfo) -> None:
    with pytest.raises(OptionError, match="give one of the two"):
        info.cls([leaf()], lower_bound=None)


@every_polyak
def test_polyak_rules_need_a_lower_bound_at_the_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], lower_bound=None)
    before = plain(optimizer.state_dict())
    with pytest.raises(OptionError, match="lower bound"):
        optimizer.step(lambda: quadratic(x))
    assert plain(optimizer.state_dict()) == before
    optimizer.step(lambda: quadratic(x), lower_bound=0.0)
    assert optimizer.record.moved


@every_search
def test_searches_do_without_a_lower_bound(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], 10.0, lower_bound=None)
    optimizer.step(lambda: quadratic(x) - 1e6)
    assert optimizer.record.moved


@every_class
def test_an_invalid_lower_bound_of_a_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    for value in (math.nan, "low"):
        with pytest.raises(OptionError, match="lower_bound"):
            optimizer.step(lambda: quadratic(x), lower_bound=value)
    assert x.tolist() == [3.0, 2.0]


@every_optimizer
def test_an_infinite_bound_is_no_bound(info: OptimizerInfo) -> None:
    x = leaf()
    if info.searches:
        return
    optimizer = info.make([x], math.inf)
    optimizer.step(lambda: quadratic(x))
    assert torch.isfinite(x).all()
    assert optimizer.record.outcome == Outcome.accepted
    assert math.isfinite(optimizer.param_groups[0]["step_size"])


@every_class
def test_closure_is_required(info: OptimizerInfo) -> None:
    optimizer = info.make([leaf()])
    for arguments in ((), (None,), (3.0,)):
        with pytest.raises(ClosureError, match="needs a closure"):
            optimizer.step(*arguments)


@every_class
def test_repr_names_options_and_the_last_step(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    assert repr(optimizer).startswith(f"{info.cls.__name__}(lr=0.1, ")
    optimizer.step(lambda: quadratic(x))
    assert "step " in repr(optimizer)


# ------------------------------------------------------------------------------------------------ saved state


def train(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
    torch.manual_seed(first)
    run(optimizer, model, batches(8)[first:last])


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
@pytest.mark.parametrize("fresh_lr", ["same", "left out"])
def test_saved_state_continues_bitwise(info: OptimizerInfo, lr: float | None, fresh_lr: str) -> None:
    straight = net()
    optimizer = info.make(straight.parameters(), lr)
    train(optimizer, straight, 0, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(optimizer, straight, 4, 8)

    resumed = net(seed=5)
    resumed.load_state_dict(saved["model"])
    again = info.make(resumed.parameters(), lr if fresh_lr == "same" else None)
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 4, 8)
    assert snapshot(resumed, again) == snapshot(straight, optimizer)
    assert repr(again.record) == repr(optimizer.record)


@every_optimizer
def test_state_dict_is_not_changed_by_later_steps(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    saved = optimizer.state_dict()
    before = plain(saved["state"]["policy"])
    optimizer.step(lambda: quadratic(x))
    assert plain(saved["state"]["policy"]) == before


@every_class
def test_defaults_and_state_are_plain(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for v in value.values():
                check(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                check(v)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, Tensor))

    check(optimizer.defaults)
    check(optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_bitwise(info: OptimizerInfo, how: Any) -> None:
    model = net()
    optimizer = info.make(model.parameters(), None)
    train(optimizer, model, 0, 4)
    other_model, other = how((model, optimizer))
    train(optimizer, model, 4, 8)
    train(other, other_model, 4, 8)
    assert snapshot(other_model, other) == snapshot(model, optimizer)


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_rebuilt_from_defaults(info: OptimizerInfo, lr: float | None) -> None:
    results = []
    for rebuild in (False, "at once", "after loading"):
        model = net()
        optimizer = info.make(model.parameters(), lr)
        if rebuild == "after loading":
            optimizer.load_state_dict(optimizer.state_dict())
        if rebuild:
            optimizer = optimizer.__class__(model.parameters(), **optimizer.defaults)
        train(optimizer, model, 0, 5)
        results.append(snapshot(model, optimizer))
    assert results[0] == results[1] == results[2]


@every_class
def test_loaded_options_are_those_that_were_saved(info: OptimizerInfo) -> None:
    models = net(), net()
    saved = info.make(models[0].parameters(), c=0.35, max_skips=7)
    loaded = info.make(models[1].parameters())
    loaded.load_state_dict(saved.state_dict())
    for model, optimizer in zip(models, (saved, loaded), strict=True):
        train(optimizer, model, 0, 4)
    assert snapshot(models[0], saved) == snapshot(models[1], loaded)
    assert repr(loaded) == repr(saved)


@every_optimizer
@pytest.mark.parametrize("stock", [torch.optim.SGD, torch.optim.Adam], ids=lambda cls: cls.__name__)
def test_another_optimizer_s_state_is_refused(info: OptimizerInfo, stock: Any) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    train(optimizer, model, 0, 2)
    before = snapshot(model, optimizer)
    with pytest.raises(OptionError, match=r"load_state_dict: .*of another optimizer.*make a new"):
        optimizer.load_state_dict(stock(net().parameters(), lr=0.1).state_dict())
    assert snapshot(model, optimizer) == before


@every_class
def test_a_wrong_saved_option_changes_nothing(info: OptimizerInfo) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    saved, before = optimizer.state_dict(), repr(optimizer)
    saved["param_groups"][0]["c"] = -1.0
    with pytest.raises(OptionError, match=r"c=-1.0"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer) == before


def twice_slower(k: Any) -> Any:
    return 1.0 / (2 * k + 1)


def test_callables_stay_out_of_the_state() -> None:
    models = net(), net()
    optimizer = SPSB(models[0].parameters(), 0.1, decay=twice_slower)
    assert optimizer.defaults["decay"] == "callable"
    train(optimizer, models[0], 0, 3)
    with pytest.raises(OptionError, match="decay"):
        SPSB(models[1].parameters(), 0.1).load_state_dict(optimizer.state_dict())
    other = SPSB(models[1].parameters(), 0.1, decay=twice_slower)
    train(other, models[1], 0, 3)
    other.load_state_dict(optimizer.state_dict())
    copied = pickle.loads(pickle.dumps(optimizer))
    for o, m in ((optimizer, models[0]), (other, models[1])):
        train(o, m, 3, 6)
    assert snapshot(models[0], optimizer) == snapshot(models[1], other)
    assert copied.rule.decay is twice_slower


# ------------------------------------------------------------------------------------------------ hooks


@every_class
def test_step_hooks_run(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(lambda: quadratic(x))
    assert seen == ["before", "after"]


@every_class
def test_global_step_hooks_and_profilers_see_the_step(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer, seen = info.make([x]), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        optimizer.step(lambda: (x**2).sum())
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]
    with torch.autograd.profiler.profile() as profile:
        optimizer.step(lambda: (x**2).sum())
    assert any(event.name == f"Optimizer.step#{info.cls.__name__}.step" for event in profile.function_events or [])
    assert seen == ["before", "after"]


@every_class
def test_gradient_hooks_run_once_per_evaluation(info: OptimizerInfo) -> None:
    x = leaf()
    seen = []
    x.register_hook(lambda g: seen.append("tensor"))
    x.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    info.make([x], 1e-3).step(lambda: quadratic(x))
    assert seen == ["tensor", "accumulated"]


# ------------------------------------------------------------------------------------------------ outcomes


@every_class
def test_zero_gradient_touches_nothing(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    before, state = x.tolist(), plain(optimizer.state_dict())
    optimizer.step(lambda: 0.0 * quadratic(x) + 1.0)
    assert optimizer.record.outcome == Outcome.zero_gradient
    assert x.tolist() == before
    assert plain(optimizer.state_dict()) == state


@every_search
def test_a_failed_search_leaves_everything_and_warns_rarely(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], 1.0)
    values = iter(range(10_000))

    def rising() -> Tensor:
        return quadratic(x) * 0.0 + 1.0 + next(values) + (x - x.detach()).sum()

    state = plain(optimizer.state_dict())
    with pytest.warns(AdaptiveBilevelWarning, match="no trial step") as caught:
        for _ in range(12):
            optimizer.step(rising)
    assert len(caught) == 2  # the 1st and the 10th
    assert optimizer.record.outcome == Outcome.search_failed
    assert x.tolist() == [3.0, 2.0]
    assert plain(optimizer.state_dict()) == state


@every_polyak
def test_a_loss_below_its_lower_bound_warns(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    with pytest.warns(AdaptiveBilevelWarning, match="lower_bound="):
        optimizer.step(lambda: quadratic(x) - 1e3)
    assert x.tolist() == [3.0, 2.0]


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_moves_nothing_and_raises_after_max_skips(info: OptimizerInfo, bad: float, where: str) -> None:
    model = net()
    optimizer = info.make(model.parameters(), None, max_skips=3)
    run(optimizer, model, batches(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    batch = batches(1)[0]

    def poisoned() -> Tensor:
        loss = closure_of(model, batch)()
        if where == "loss":
            return loss * bad
        return loss + (model.first.weight - model.first.weight.detach()).sum() * bad

    if where == "gradient":
        # The value stays finite: 0 * inf would be NaN, so the gradient is spoilt by a hook.
        def poisoned() -> Tensor:
            loss = closure_of(model, batch)()
            if loss.requires_grad:
                loss.register_hook(lambda g: g * bad)
            return loss

    before = snapshot(model, optimizer)
    for _ in range(2):
        optimizer.step(poisoned)
        assert optimizer.record.outcome == Outcome.non_finite
        assert snapshot(model, optimizer) == before
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        optimizer.step(poisoned)
    assert snapshot(model, optimizer) == before
    run(optimizer, model, batches(1))  # and it can go on
    optimizer.step(poisoned)


@every_optimizer
@pytest.mark.parametrize("which", ["closure", "step_closure"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_in_either_of_two_samples(info: OptimizerInfo, which: str, where: str) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    good = closure_of(model, batches(2)[0])

    def poisoned() -> Tensor:
        loss = closure_of(model, batches(2)[1])()
        if where == "loss":
            return loss * math.nan
        if loss.requires_grad:
            loss.register_hook(lambda g: g * math.inf)
        return loss

    before = snapshot(model, optimizer)
    closures = {"closure": good, "step_closure": good, which: poisoned}
    optimizer.step(**closures)
    assert optimizer.record.outcome == Outcome.non_finite
    assert snapshot(model, optimizer) == before


@every_search
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_trial_is_rejected(info: OptimizerInfo, bad: float) -> None:
    x = leaf()
    optimizer = info.make([x], 0.01)
    calls = iter(range(100))

    def closure() -> Tensor:
        return quadratic(x) if next(calls) != 1 else quadratic(x) * 0 + bad

    optimizer.step(closure)
    assert optimizer.record.trials == 2
    assert optimizer.record.step_size == pytest.approx(0.005)


# ------------------------------------------------------------------------------------------------ 2-sample, loss=


@every_class
def test_two_samples(info: OptimizerInfo) -> None:
    x, y = leaf(), leaf()
    optimizer = info.make([x], 0.2)
    optimizer.step(lambda: quadratic(x), step_closure=lambda: quadratic(x - 1.0))
    other = info.make([y], 0.2)
    gradient = torch.autograd.grad(quadratic(y), y)[0]
    other.step(lambda: quadratic(y - 1.0))
    assert repr(optimizer.record) == repr(other.record)
    torch.testing.assert_close(x.detach(), torch.tensor([3.0, 2.0]) - other.record.step_size * gradient)
    assert optimizer.evaluations.upper.gradients == 2
    with pytest.raises(ClosureError, match="needs a closure"):
        optimizer.step(lambda: quadratic(x), step_closure=3)


@every_polyak
@pytest.mark.parametrize(
    "kind", [Tensor.item, lambda loss: loss, lambda loss: loss.detach()], ids=["float", "graph", "bare"]
)
def test_a_loss_in_the_place_of_a_closure(info: OptimizerInfo, kind: Any) -> None:
    x, y = leaf(), leaf()
    one, two = info.make([x]), info.make([y])
    for _ in range(4):
        one.step(lambda: quadratic(x))
        two.zero_grad()
        loss = quadratic(y)
        loss.backward()
        grad = y.grad
        two.step(loss=kind(loss))
        assert y.grad is grad
    assert x.tolist() == y.tolist()
    assert plain(one.state_dict()) == plain(two.state_dict())


@every_polyak
def test_a_wrong_loss_argument(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    quadratic(x).backward()
    for loss in (torch.ones(2), torch.ones((), dtype=torch.complex64), "low"):
        with pytest.raises(ClosureError):
            optimizer.step(loss=loss)
    with pytest.raises(ClosureError, match="one of the two"):
        optimizer.step(lambda: quadratic(x), loss=1.0)
    x.grad = None
    with pytest.raises(ClosureError, match="grad"):
        optimizer.step(loss=1.0)
    assert x.tolist() == [3.0, 2.0]


# ------------------------------------------------------------------------------------------------ directions


def adam_problem(x: Tensor) -> Tensor:
    return quadratic(x - 0.3) + torch.sin(3 * x).sum() + 10.0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
def test_a_constant_step_along_adam_is_torch_adam(betas: tuple[float, float]) -> None:
    x, y = leaf(), leaf()
    ours = SPSMax([x], 0.05, floor=0.05, direction="adam", betas=betas)
    theirs = torch.optim.Adam([y], lr=0.05, betas=betas)
    for k in range(50):
        before, gradient = x.detach().clone(), torch.autograd.grad(adam_problem(x), x)[0]
        ours.step(lambda: adam_problem(x))
        theirs.zero_grad()
        adam_problem(y).backward()
        theirs.step()
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        if k == 0:
            torch.testing.assert_close(x.detach(), before - 0.05 * gradient / (gradient.abs() + 1e-8))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", ["polyak", "search"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_constant_step_is_torch_sgd_bitwise(foreach: bool, kind: str, dtype: torch.dtype) -> None:
    models = [net(dropout=0.0).to(dtype) for _ in range(2)]
    data = [(x.to(dtype), t) for x, t in batches(10)]
    groups: Any = [
        [{"params": [*m.first.parameters()]}, {"params": [*m.norm.parameters(), *m.second.parameters()]}]
        for m in models
    ]
    for g in groups:
        g[1]["lr"] = 0.025
    ours: Any
    if kind == "polyak":
        ours = SPSMax(groups[0], 0.1, floor=0.1)
    else:
        ours = SLS(groups[0], 0.1, reset="initial", slack=1e9, lower_bound=None)
    theirs = torch.optim.SGD(groups[1], lr=0.1, foreach=foreach)
    for batch in data:
        ours.step(closure_of(models[0], batch))
        theirs.zero_grad()
        closure_of(models[1], batch)().backward()
        theirs.step()
        assert plain(models[0].state_dict()) == plain(models[1].state_dict())
    if kind == "search":
        assert ours.evaluations.upper.values == len(data)


# ------------------------------------------------------------------------------------------------ tensors


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_short_dtypes(info: OptimizerInfo, dtype: torch.dtype) -> None:
    x = leaf(3.0, 2.0, dtype=dtype)
    options = {"eps": 1e-4} if "direction" in info.options else {}
    optimizer = info.make([x], None, **options)
    first = quadratic(x).item()
    for _ in range(5):
        optimizer.step(lambda: quadratic(x))
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    assert quadratic(x).item() < 0.5 * first
    assert isinstance(optimizer.record.slope, float)


@every_optimizer
def test_mixed_dtypes_and_shapes(info: OptimizerInfo) -> None:
    params = [
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.float32).t()),
        nn.Parameter(torch.empty(0)),
        nn.Parameter(torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last)),
    ]
    optimizer = info.make(params, None)
    losses = [float(optimizer.step(lambda: sum((p.double() ** 2).sum() for p in params))) for _ in range(10)]
    assert losses[-1] < losses[0]


@every_optimizer
def test_frozen_and_unused_parameters(info: OptimizerInfo) -> None:
    x, frozen, unused = leaf(), leaf(), leaf()
    frozen.requires_grad_(False)
    optimizer = info.make([frozen, x, unused])
    for _ in range(3):
        optimizer.step(lambda: quadratic(x) + quadratic(frozen))
    assert frozen.tolist() == unused.tolist() == [3.0, 2.0] != x.tolist()
    assert frozen.grad is unused.grad is x.grad is None
    frozen.requires_grad_(True)
    x.requires_grad_(False)
    optimizer.step(lambda: quadratic(x) + quadratic(frozen))
    assert frozen.tolist() != [3.0, 2.0]


@every_optimizer
def test_a_loss_that_no_parameter_enters(info: OptimizerInfo) -> None:
    x, other = leaf(), leaf()
    optimizer = info.make([x])
    optimizer.step(lambda: quadratic(other))
    assert optimizer.record.outcome == Outcome.zero_gradient
    assert other.grad is None
    x.requires_grad_(False)
    optimizer.step(lambda: quadratic(other))
    assert optimizer.record.outcome == Outcome.zero_gradient


@every_optimizer
def test_storage_is_kept(info: OptimizerInfo) -> None:
    model = net()
    pointers = {name: t.data_ptr() for name, t in model.named_parameters()}
    objects = {name: id(t) for name, t in model.named_parameters()}
    run(info.make(model.parameters(), None), model, batches(4))
    assert {name: t.data_ptr() for name, t in model.named_parameters()} == pointers
    assert {name: id(t) for name, t in model.named_parameters()} == objects


@every_class
def test_sparse_gradients_are_refused(info: OptimizerInfo) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = info.make(table.parameters())
    before = snapshot(table, optimizer)
    with pytest.raises(TensorError, match="sparse"):
        optimizer.step(lambda: (table(torch.tensor([1, 2])) ** 2).sum())
    assert snapshot(table, optimizer) == before


# A bound that nobody gave.


def valley(x: Tensor) -> Tensor:
    """x^2 / (1 + x^2): far out it is flat, and Polyak's ratio beyond the minimizer by far."""
    return (x**2 / (1.0 + x**2)).sum()


@every_polyak
@pytest.mark.parametrize("where", [3.0, 10.0, 1e3])
def test_a_first_step_does_not_ascend(info: OptimizerInfo, where: float) -> None:
    x = nn.Parameter(torch.tensor([where]))
    optimizer = info.make([x], None)
    first = float(optimizer.step(lambda: valley(x)))
    assert optimizer.record.moved and optimizer.record.trials == optimizer.evaluations.upper.values > 1
    assert float(valley(x.detach())) <= first
    assert optimizer._workspace.copies == []
    tried = optimizer.evaluations.upper.values
    optimizer.step(lambda: valley(x))
    assert optimizer.evaluations.upper.values == tried


@every_polyak
def test_two_samples_try_the_one_of_the_step(info: OptimizerInfo) -> None:
    """x0^2 gives the direction, 100 x0^2 the step: what does not raise that raises neither."""
    seen: list[float] = []

    def rule() -> Tensor:
        seen.append(x.item())
        return 100.0 * (x**2).sum()

    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = info.make([x], None)
    optimizer.step(lambda: (x**2).sum(), step_closure=rule)
    assert len(seen) == 1 + optimizer.record.trials > 1
    assert seen[0] == 1.0 and abs(seen[-1]) <= 1.0


@every_class
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_no_first_step_without_descent(info: OptimizerInfo, value: float) -> None:
    """The loss goes up along the negative of its gradient, or is not a number: nothing moves, and nothing is kept."""
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = info.make([x], None)

    def wrong() -> Tensor:
        return (2.0 - x).sum() + 2.0 * (x - x.detach()).sum() + (0.0 if x.item() == 1.0 else value - value)

    with pytest.warns(AdaptiveBilevelWarning, match="no trial step"):
        optimizer.step(wrong)
    assert optimizer.record.outcome == Outcome.search_failed
    assert x.item() == 1.0
    assert "policy" not in optimizer.state_dict()["state"]
