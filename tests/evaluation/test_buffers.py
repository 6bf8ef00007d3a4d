"""Buffers after a step are those of one evaluation, whatever kind of module has them, and however it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import assign, implicit
from tests.evaluation.helpers import many_trials, side_effects
from tests.optim.helpers import (
    CLASSES,
    OptimizerInfo,
    batches,
    closure_of,
    every_optimizer,
    every_search,
    net,
    plain,
    run,
)


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))


class Remembers(nn.Module):
    """Buffers in awkward ways: made at the first call, set on a child, and of a growing shape."""

    child: Any
    mean: Any
    history: Any

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 3)
        self.child.register_buffer("seen", torch.zeros(1))
        self.register_buffer("mean", None)
        self.register_buffer("history", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            old = x.mean(0) if self.mean is None else self.mean
            self.mean = 0.9 * old + 0.1 * torch.rand(6)
            self.history = torch.cat([self.history, x.mean().reshape(1)])
            self.child.seen = self.child.seen + 1
        return self.child(x + self.mean)


MODELS: dict[str, Callable[[], Any]] = {
    "net": net,
    "spectral norm": spectral,
    "awkward buffers": Remembers,
    "cumulative batch norm": lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)),
}


@every_optimizer
@pytest.mark.parametrize("kind", MODELS)
def test_side_effects_are_those_of_one_evaluation(info: OptimizerInfo, kind: str) -> None:
    torch.manual_seed(3)
    model = MODELS[kind]()
    reference = MODELS[kind]()
    reference.load_state_dict(model.state_dict())
    optimizer = info.make(model.parameters(), 1e3 if info.searches else 0.1)
    for batch in batches(3):
        reference.load_state_dict({k: v for k, v in model.state_dict().items() if k != "mean"}, strict=False)
        if kind == "awkward buffers":
            reference.mean = None if model.mean is None else model.mean.clone()
            reference.history = model.history.clone()
        state = torch.get_rng_state()
        closure_of(reference, batch)().backward()
        expected = side_effects(reference)
        torch.set_rng_state(state)
        optimizer.step(closure_of(model, batch))
        assert side_effects(model) == expected
    if info.searches and kind == "net":
        assert optimizer.evaluations.lower.values > 3


def test_a_module_met_only_later(info: OptimizerInfo = CLASSES[3]) -> None:
    model: Any = net(dropout=0.0)
    extra: Any = nn.BatchNorm1d(3)
    optimizer = many_trials(model.parameters())
    calls = iter(range(1000))
    use = [1]  # the extra module runs in the second evaluation only
    x, target = batches(1)[0]

    def closure() -> Tensor:
        out = model(x)
        return nn.functional.cross_entropy(extra(out) if next(calls) in use else out, target)

    before = plain(extra.state_dict())
    optimizer.step(closure)
    assert plain(extra.state_dict()) == before
    use[:] = range(1000)
    optimizer.step(closure)
    assert int(extra.num_batches_tracked) == 1


def test_lazy_modules() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(4, 3))
    optimizer = many_trials(model.parameters())
    run(optimizer, model, batches(2))
    assert int(model[1].num_batches_tracked) == 2


@every_search
def test_functional_call_leaves_the_module_its_own_buffers(info: OptimizerInfo) -> None:
    model: Any = net()
    stand_in: Any = net(seed=7)
    own = dict(model.named_buffers())
    params: Any = {k: nn.Parameter(v.detach().clone()) for k, v in stand_in.named_parameters()}
    buffers: Any = {k: v.clone() for k, v in stand_in.named_buffers()}
    optimizer = info.make(params.values(), 1e3)
    (x, target), before = batches(1)[0], plain(model.state_dict())
    optimizer.step(lambda: nn.functional.cross_entropy(functional_call(model, (params, buffers), (x,)), target))
    assert plain(model.state_dict()) == before
    assert all(b is own[k] for k, b in model.named_buffers())
    assert int(buffers["norm.num_batches_tracked"]) == 1
    optimizer.step(lambda: nn.functional.cross_entropy(functional_call(model, params, (x,)), target))
    assert int(model.norm.num_batches_tracked) == 1
    assert int(model.calls) == 1


@every_search
@pytest.mark.parametrize("what", ["module", "function"])
def test_compiled(info: OptimizerInfo, what: str) -> None:
    torch.compiler.reset()
    plain_model, model = net(), net()
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    forward = (
        torch.compile(model, backend=backend)
        if what == "module"
        else torch.compile(lambda x: model(x), backend=backend)
    )
    optimizers = [info.make(m.parameters(), 1e2) for m in (plain_model, model)]
    counts = []
    torch.manual_seed(0)
    run(optimizers[0], plain_model, batches(3))
    torch.manual_seed(0)
    for x, target in batches(3):
        optimizers[1].step(lambda: nn.functional.cross_entropy(forward(x), target))
        counts.append(len(compilations))
    of = nn.Module.state_dict if what == "module" else lambda m: dict(m.named_parameters())
    assert plain(of(model)) == plain(of(plain_model))
    assert counts[-1] == counts[0]
    torch.compiler.reset()


def test_two_models_share_nothing() -> None:
    """Buffers of a module that runs outside of closures are left alone."""
    model: Any = net()
    other: Any = net(seed=1)
    optimizer = many_trials(model.parameters())
    run(optimizer, model, batches(1))
    other(batches(1)[0][0])
    assert int(other.norm.num_batches_tracked) == 1
    run(optimizer, model, batches(1))
    assert int(other.norm.num_batches_tracked) == 1
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


class Registered(nn.Module):
    """A layer whose weight is a buffer that requires a gradient, as meta-learning code registers its variables."""

    weight: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(3, requires_grad=True))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight


@every_optimizer
def test_variables_that_modules_hold_as_buffers_are_moved(info: OptimizerInfo) -> None:
    layer, data = Registered(), torch.randn(8, 3)
    optimizer = info.make([layer.weight], 0.1)
    values = [float(optimizer.step(lambda: (layer(data) - 1.0).square().mean())) for _ in range(5)]
    assert values[-1] < values[0]
    assert bool(layer.weight.any())
    assert layer.calls == 5  # one for each step, as without trials


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_level_that_modules_hold_as_buffers_is_moved(level: str) -> None:
    layer, data, other = Registered(), torch.randn(8, 3), torch.zeros(3, requires_grad=True)
    x, y = (layer.weight, other) if level == "upper" else (other, layer.weight)

    def both() -> tuple[Tensor, Tensor]:
        seen, plain = layer(data), data @ other
        return (seen, plain) if level == "upper" else (plain, seen)

    def lower() -> Tensor:
        of_x, of_y = both()
        return (of_y - of_x - 0.1).cosh().mean() + 0.01 * y.square().sum()

    def upper() -> Tensor:
        return (both()[1] - 1.0).square().mean()

    inner = SLS([y])
    outer = BiSLS([x], lower=inner)
    values = []
    for _ in range(10):
        inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        values.append(float(outer.step(upper)))
        assert outer.record is not None and outer.record.moved
    assert values[-1] < values[0]
