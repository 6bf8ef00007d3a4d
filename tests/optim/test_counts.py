"""What a step costs, in counts: evaluations, host reads, allocations, and what it must never call."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_bilevel import SLS, AutoSLS
from adaptive_bilevel.errors import NonFiniteError
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    closure_of,
    every_class,
    every_optimizer,
    every_polyak,
    every_search,
    net,
    run,
)

READS = ("item", "tolist", "numpy", "__float__", "__bool__", "__int__", "__index__", "__array__")


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Count what reads a tensor's value into Python (and would wait for an accelerator)."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(Tensor, name) for name in READS}

    def counting(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](self, *args, **kwargs)

        return read

    for name in READS:
        setattr(Tensor, name, counting(name))
    try:
        yield counts
    finally:
        for name in READS:
            setattr(Tensor, name, originals[name])


class Evaluations:
    """A closure that counts its calls, and its backwards by a hook on the parameter."""

    def __init__(self, params: list[nn.Parameter], curvature: float = 1.0) -> None:
        self.params, self.curvature = params, curvature
        self.forwards = self.with_graph = self.backwards = 0
        for p in params:
            p.register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    def __call__(self) -> Tensor:
        self.forwards += 1
        loss = sum((self.curvature * p**2).sum() for p in self.params)
        assert isinstance(loss, Tensor)
        self.with_graph += loss.requires_grad
        return loss


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(1.0, 2.0, n)) for n in sizes or (300, 4000)]


def looks(info: OptimizerInfo) -> int:
    """How many more values a step takes: `AutoSLS` looks where a step along Adam's mean has led."""
    return int(info.cls is AutoSLS and info.options.get("direction") == "adam")


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, 100.0, None])
def test_one_gradient_and_one_value_per_trial(info: OptimizerInfo, lr: float | None) -> None:
    params = parameters()
    optimizer = info.make(params, lr)
    for k in range(4):
        closure = Evaluations(params)
        before = copy.copy(optimizer.evaluations.lower)
        optimizer.step(closure)
        trials = optimizer.record.trials
        assert (trials > 0) is (info.searches or (lr is None and k == 0))
        trials += looks(info)
        assert closure.forwards == 1 + trials
        assert closure.with_graph == 1
        assert closure.backwards == len(params)
        after = optimizer.evaluations.lower
        assert (after.values - before.values, after.gradients - before.gradients) == (trials, 1)
        for p in params:
            p._backward_hooks = None


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, 100.0])
def test_one_host_read_and_one_per_trial(info: OptimizerInfo, lr: float) -> None:
    model = net()
    optimizer = info.make(model.parameters(), lr)
    for batch in batches(3):
        with host_reads() as counts:
            optimizer.step(closure_of(model, batch))
        more = 3 if info.cls is AutoSLS else 0  # f at the mean, and whether somebody has moved it: before, after
        assert sum(counts.values()) <= 1 + optimizer.record.trials + more, counts


@every_search
def test_a_backward_of_its_own_costs_two_reads_more(info: OptimizerInfo) -> None:
    """They compare the loss that was differentiated with the one that was returned."""
    (p,) = parameters(3)
    optimizer = info.make([p], 0.1)

    def closure() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss.detach()

    with host_reads() as counts:
        optimizer.step(closure)
    place = int(info.cls is AutoSLS)  # where the step leaves the parameters
    assert sum(counts.values()) == 3 + optimizer.record.trials + looks(info) + place


class Allocations(TorchDispatchMode):
    """Records operators whose outputs are new memory of at least some number of elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, Counter[str]()
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if self.on and isinstance(t, Tensor) and t.numel() >= self.least:
                if t.untyped_storage().data_ptr() not in known:
                    self.found[str(func)] += 1
        return out


def allocations(info: OptimizerInfo, lr: float) -> Counter[str]:
    """Allocations of three steps, without those of evaluations: a gradient per parameter, and what the loss needs."""
    params = parameters(300, 400)
    optimizer = info.make(params, lr)
    evaluate = Evaluations(params)
    mode = Allocations(300)
    waiting: list[nn.Parameter] = []

    def closure() -> Tensor:
        mode.on = False
        loss = evaluate()
        if loss.requires_grad:
            waiting[:] = params
        else:
            mode.on = True
        return loss

    def differentiated(p: Tensor) -> None:
        waiting.pop()
        mode.on = not waiting

    for p in params:
        p.register_post_accumulate_grad_hook(differentiated)
    for _ in range(2):
        optimizer.step(closure)
    with mode:
        for _ in range(3):
            mode.on = True
            optimizer.step(closure)
    return mode.found


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, 100.0])
def test_no_parameter_sized_allocations(info: OptimizerInfo, lr: float) -> None:
    found = allocations(info, lr)
    if info.options.get("direction") == "adam":
        # Two moments, which replace the old ones only when the step is certain; the root; two directions.
        assert sum(found.values()) <= 3 * 2 * 5, found
    else:
        assert not found


def test_the_allocation_counter_counts() -> None:
    mode = Allocations(300)
    with mode:
        torch.ones(300) + torch.ones(300)
        torch.ones(299).add_(1)
    assert sum(mode.found.values()) == 3


@every_class
def test_forbidden_calls(info: OptimizerInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = info.make(model.parameters(), 100.0)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called at a step")

    monkeypatch.setattr(copy, "deepcopy", forbidden)
    monkeypatch.setattr(torch, "manual_seed", forbidden)
    monkeypatch.setattr(torch.random, "manual_seed", forbidden)
    monkeypatch.setattr(nn.Module, "state_dict", forbidden)
    run(optimizer, model, batches(3))


# ------------------------------------------------------------------------------------------------ without host reads


def on_device(info: OptimizerInfo, params: Any, **options: Any) -> Any:
    """An optimizer on its accelerator path: scalars stay tensors."""
    optimizer = info.make(params, **options)
    optimizer._on_host = lambda _: False
    return optimizer


@every_polyak
@pytest.mark.parametrize("lr", [0.1, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_path_without_host_reads_is_the_same(info: OptimizerInfo, lr: float | None, groups: int) -> None:
    models: Any = [net(), net()]
    optimizers: list[Any] = []
    makers: Any = (info.make, lambda p, **o: on_device(info, p, **o))
    for make, model in zip(makers, models, strict=True):
        params: Any = [*model.parameters()]
        if groups == 2:
            params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
        optimizers.append(make(params, lr=lr))
    for optimizer, model in zip(optimizers, models, strict=True):
        torch.manual_seed(0)
        for batch in batches(6):
            closure = closure_of(model, batch)
            with host_reads() as counts:
                optimizer.step(closure)
        if optimizer is optimizers[1]:
            assert not counts
            assert isinstance(optimizer.record.step_size, Tensor)
    # Adam makes steps of any size out of gradients that are rounding errors (a bias before batch norm).
    tolerance = 1e-7 if info.options else 1e-12
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-9, atol=tolerance)
    host, device = (o.state_dict()["param_groups"] for o in optimizers)
    for a, b in zip(host, device, strict=True):
        assert (a["scale"], a["step_size"]) == pytest.approx((float(b["scale"]), float(b["step_size"])))
    assert "step " in repr(optimizers[1])


@every_polyak
def test_zero_lr_and_zero_gradient_without_host_reads(info: OptimizerInfo) -> None:
    results = []
    for make in (info.make, lambda p, lr: on_device(info, p, lr=lr)):
        p = nn.Parameter(torch.tensor([3.0, 2.0]))
        optimizer = make([p], None)
        optimizer.param_groups[0]["lr"] = 0.0
        for factor in (1.0, 0.0, 1.0, 1.0):
            optimizer.step(lambda: factor * (p**2).sum())
            optimizer.param_groups[0]["lr"] = 1.0
        results.append([*p.tolist(), *(float(optimizer.param_groups[0][k]) for k in ("scale", "step_size"))])
    assert results[0] == pytest.approx(results[1])


@every_polyak
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("steps", [0, 2])
def test_non_finite_without_host_reads(info: OptimizerInfo, where: str, steps: int) -> None:
    model = net()
    optimizer = on_device(info, model.parameters(), lr=None, max_skips=4)
    run(optimizer, model, batches(steps))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {**optimizer._rule_state()._asdict(), **optimizer.state.get("policy", {})}
    moments = {k: dict(v) for k, v in optimizer.state.items() if k != "policy"}

    def poisoned() -> Tensor:
        loss = closure_of(model, batches(1)[0])()
        if where == "loss":
            return loss * torch.nan
        loss.register_hook(lambda g: g * torch.inf)
        return loss

    optimizer.step(poisoned)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    after = optimizer.state["policy"]
    assert {k: float(after[k]) for k in state} == {k: float(v) for k, v in state.items()}
    for p, saved in moments.items():
        torch.testing.assert_close(optimizer.state[p], saved, rtol=0, atol=0)
    with pytest.raises(NonFiniteError):
        for _ in range(8):  # looked at every max_skips steps only
            optimizer.step(poisoned)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@every_polyak
def test_saved_without_host_reads(info: OptimizerInfo) -> None:
    models: Any = net(), net(seed=2)
    one, two = (on_device(info, m.parameters(), lr=None) for m in models)
    run(one, models[0], batches(3))
    file = io.BytesIO()
    torch.save([models[0].state_dict(), one.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    two.load_state_dict(state)
    for o, m in ((one, models[0]), (two, models[1])):
        torch.manual_seed(3)
        run(o, m, batches(3))
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


@pytest.mark.device
@every_optimizer
def test_on_an_accelerator(info: OptimizerInfo, device: torch.device) -> None:
    models = net(dropout=0.0).float(), net(dropout=0.0).float().to(device)
    optimizers = [info.make(m.parameters(), None) for m in models]
    for x, target in batches(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            where = next(model.parameters()).device
            optimizer.step(closure_of(model, (x.float().to(where), target.to(where))))
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].cpu().named_parameters()))


@pytest.mark.device
def test_dropout_on_an_accelerator_replays(device: torch.device) -> None:
    dropout, x = nn.Dropout(0.5), nn.Parameter(torch.ones(64, device=device))
    masks = []

    def closure() -> Tensor:
        masks.append(dropout(torch.ones(64, device=device)))
        return ((x * masks[-1]) ** 2).sum()

    SLS([x], 1e3, lower_bound=None).step(closure)
    assert len(masks) > 2
    assert all(torch.equal(m, masks[0]) for m in masks)
