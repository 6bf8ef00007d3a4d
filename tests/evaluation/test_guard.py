"""A trial leaves no trace: buffers, random state, gradients, exceptions, and every way to write a closure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from adaptive_bilevel import SLS, SPSB, SPSMax
from adaptive_bilevel.errors import ClosureError
from tests.optim.helpers import (
    CLASSES,
    OptimizerInfo,
    batches,
    closure_of,
    every_class,
    every_optimizer,
    every_search,
    net,
    plain,
    run,
    snapshot,
)


def side_effects(model: Any) -> Any:
    """Everything but the parameters that an evaluation changes."""
    return plain([dict(model.named_buffers()), torch.get_rng_state()])


def many_trials(params: Any) -> SLS:
    """A search that makes several trials from its first step on."""
    return SLS(params, 1e3, lower_bound=None, reset="initial")


# ------------------------------------------------------------------------------------------------ buffers, random state


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
        assert optimizer.evaluations.upper.values > 3


@every_search
def test_all_trials_see_the_same_mask_and_the_next_step_another(info: OptimizerInfo) -> None:
    model = net()
    masks: list[list[Any]] = []
    model.dropout.register_forward_hook(lambda m, a, out: masks[-1].append((out != 0).tolist()))
    optimizer = info.make(model.parameters(), 1e4, lower_bound=None, reset="initial")
    for _ in range(3):
        masks.append([])
        optimizer.step(lambda: model(torch.ones(16, 6) + torch.arange(16.0)[:, None]).square().mean())
    ones = nn.Dropout(0.5)
    x = nn.Parameter(torch.ones(64))
    drawn: list[list[Tensor]] = []

    def closure() -> Tensor:
        out = ones(torch.ones(64))
        drawn[-1].append(out)
        return ((x * out) ** 2).sum()

    optimizer = info.make([x], 1e3, lower_bound=None, reset="initial")
    for _ in range(3):
        drawn.append([])
        optimizer.step(closure)
        assert len(drawn[-1]) > 2
        assert all(torch.equal(out, drawn[-1][0]) for out in drawn[-1])
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[1][0], drawn[2][0])


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


# ------------------------------------------------------------------------------------------------ exceptions


class Broken(Exception):
    pass


@every_optimizer
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("index", range(4))
def test_an_exception_leaves_everything_as_it_was(
    info: OptimizerInfo, error: type[BaseException], when: str, index: int
) -> None:
    model = net()
    optimizer = info.make(model.parameters(), 1e3, reset="initial") if info.searches else info.make(model.parameters())
    run(optimizer, model, batches(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls = iter(range(100))
    call = -1
    evaluate = closure_of(model, batches(3)[2])

    def fail_inside(*_: Any) -> None:
        if call == index and when == "inside":
            raise error

    model.second.register_forward_pre_hook(fail_inside)  # after buffers were changed and random numbers drawn

    def closure() -> Tensor:
        nonlocal call
        call = next(calls)
        if call == index and when == "before":
            raise error
        loss = evaluate()
        if call == index:
            raise error
        return loss

    before, record = snapshot(model, optimizer), optimizer.record
    try:
        optimizer.step(closure, step_closure=closure)
    except error:
        assert snapshot(model, optimizer) == before
        assert optimizer.record is record
    else:
        assert not info.searches or optimizer.record.trials < 2
        assert next(calls) <= index
    assert torch.autograd.backward is ORIGINAL_BACKWARD
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


ORIGINAL_BACKWARD = torch.autograd.backward


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
        asked, usual = offered.evaluations.upper, direct.evaluations.upper
        assert asked.values - usual.values == (1 if offset < 0.0 else 2)  # at x; and after another step
        assert asked.gradients - usual.gradients == (0 if offset < 0.0 else 1)
        assert plain(offered.state_dict()["state"]["policy"]) == plain(direct.state_dict()["state"]["policy"])


@every_optimizer
@pytest.mark.parametrize(("gained", "back"), [(0.5, True), (2.0, False)])
def test_a_prediction_has_to_be_worth_more_than_a_step(info: OptimizerInfo, gained: float, back: bool) -> None:
    """The prediction gained half of, or twice, what a step of the last length gains; buffers and draws are its own."""
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
        ends.append(plain([x, *norm.buffers(), torch.get_rng_state(), optimizer.state_dict()["state"]["policy"]]))
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


# ------------------------------------------------------------------------------------------------ ways to write them


def variants(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    loss_of = closure_of(model, batch)

    def with_backward() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    def model_zero_grad() -> Tensor:
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    def returning_float() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.item()

    def returning_detached() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    def returning_nothing() -> None:
        loss_of().backward()

    def one_element() -> Tensor:
        return loss_of().reshape(1, 1)

    def functional_backward() -> Tensor:
        loss = loss_of()
        torch.autograd.backward([loss])
        return loss

    def weighted_backward() -> Tensor:
        loss = loss_of()
        loss.reshape(1).backward(torch.ones(1))
        return loss

    def no_grad_off() -> Tensor:
        with torch.enable_grad():
            return loss_of()

    def twice_on_one_graph() -> Tensor:
        loss = loss_of()
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
        return loss.detach()

    def several_roots() -> Tensor:
        loss = loss_of()
        torch.autograd.backward([0.25 * loss, 0.75 * loss])
        return loss.detach()

    return {
        f.__name__: f
        for f in (
            with_backward,
            model_zero_grad,
            returning_float,
            returning_detached,
            returning_nothing,
            one_element,
            functional_backward,
            weighted_backward,
            no_grad_off,
            twice_on_one_graph,
            several_roots,
        )
    }


@every_class
@pytest.mark.parametrize("name", variants(net(), None, batches(1)[0]))
def test_all_closures_are_alike(info: OptimizerInfo, name: str) -> None:
    results = []
    for kind in ("plain", name):
        torch.manual_seed(0)
        model = net()
        optimizer = info.make(model.parameters(), 10.0)
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
        held = [p.grad for p in model.parameters()]
        for batch in batches(3):
            closures = {"plain": closure_of(model, batch), **variants(model, optimizer, batch)}
            loss = optimizer.step(closures[kind])
            assert isinstance(loss, Tensor)
            assert loss.shape == ()
            assert not loss.requires_grad
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        results.append(model.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@every_class
@pytest.mark.parametrize("returns", [Tensor.item, lambda loss: loss, lambda loss: None], ids=["float", "loss", "none"])
def test_gradient_accumulation(info: OptimizerInfo, returns: Any) -> None:
    data = batches(4)
    whole = torch.cat([x for x, _ in data]), torch.cat([t for _, t in data])
    one, two = (nn.Linear(6, 3) for _ in range(2))
    two.load_state_dict(one.state_dict())
    a, b = (info.make(m.parameters(), 10.0) for m in (one, two))

    def micro() -> Any:
        b.zero_grad()
        total: Any = 0.0
        for batch in data:
            loss = closure_of(two, batch)() / 4
            loss.backward()
            total = total + loss
        return returns(total)

    for _ in range(3):
        first, second = a.step(closure_of(one, whole)), b.step(micro)
        torch.testing.assert_close(first, second)
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_accumulation_keeps_few_graphs() -> None:
    x = nn.Parameter(torch.ones(2))
    alive, most = [0], [0]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return t.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            alive[0] -= 1
            return g

    def closure() -> float:
        total = 0.0
        for _ in range(10):
            loss = Node.apply(x).square().sum()
            loss.backward()
            total += loss.item()
        return total

    SPSMax([x], 0.1).step(closure)
    assert most[0] == 2  # the first backward waits to see whether there is a second


@every_class
def test_closures_that_differentiate_inside(info: OptimizerInfo) -> None:
    def inner_steps(x: Tensor) -> Tensor:
        y = torch.zeros(2, requires_grad=True)
        for _ in range(3):
            (grad,) = torch.autograd.grad(((y - x) ** 2).sum() + (y**4).sum(), y, create_graph=True)
            y = y - 0.05 * grad
        return y

    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1.0)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return ((inner_steps(x) - 1.0) ** 2).sum()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0]
    if info.searches:
        # Once a trial without gradients is refused; from then on trials run with them.
        assert calls.count(False) == 1


@every_class
def test_checkpointed_models(info: OptimizerInfo) -> None:
    results = []
    for checkpointed in (False, True):
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = info.make(model.parameters(), 1.0)
        torch.manual_seed(0)
        for x, target in batches(3):

            def closure(x: Tensor = x, target: Tensor = target) -> Any:
                out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
                loss = nn.functional.cross_entropy(out, target)
                (loss / 2).backward(retain_graph=True)
                (loss / 2).backward()
                return loss.item()

            optimizer.step(closure)
        results.append(model.state_dict())
    torch.testing.assert_close(results[0], results[1])


@every_class
def test_grad_scaler_by_position(info: OptimizerInfo) -> None:
    models = net(dropout=0.0), net(dropout=0.0)
    optimizers = [info.make(m.parameters(), 1.0) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in batches(3):
        optimizers[0].step(closure_of(models[0], batch))

        def scaled(batch: Any = batch) -> Tensor:
            optimizers[1].zero_grad()
            loss = closure_of(models[1], batch)()
            scaler.scale(loss).backward()
            return loss

        scaler.scale(
            torch.stack([p.sum() for p in models[1].parameters()]).sum()
        ).backward()  # a backward of the user's own
        scaler.step(optimizers[1], scaled)
        scaler.update()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-9, atol=1e-12)


@every_class
def test_a_backward_on_another_loss_than_the_returned_one(info: OptimizerInfo) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure() -> float:
        loss = closure_of(model, batches(1)[0])()
        scaler.scale(loss).backward()
        return loss.item()

    before = snapshot(model, optimizer)
    with pytest.raises(ClosureError, match="scaled loss"):
        optimizer.step(closure)
    assert snapshot(model, optimizer) == before


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "vector": lambda x: x**2,
    "empty": lambda x: (x**2)[:0],
    "detached": lambda x: (x**2).sum().detach(),
    "number": lambda x: 3.0,
    "none": lambda x: None,
    "text": lambda x: "loss",
    "complex": lambda x: torch.complex(x, x).sum(),
    "whole": lambda x: (x**2).sum().long(),
    "pair": lambda x: ((x**2).sum(), x),
    "sparse": lambda x: (x**2).sum().reshape(1).to_sparse(),
}


@every_class
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_loss_is_refused(info: OptimizerInfo, kind: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x])
    optimizer.step(lambda: (x**2).sum())
    before = snapshot(model, optimizer), plain(x)

    def closure() -> Any:
        model(torch.randn(4, 2))
        return WRONG[kind](x)

    with pytest.raises(ClosureError, match="closure returned") as caught:
        optimizer.step(closure)
    assert isinstance(caught.value, TypeError)
    assert (snapshot(model, optimizer), plain(x)) == before


@every_search
def test_a_trial_that_is_no_loss_is_refused(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1e3)
    before = plain([x, optimizer.state_dict()])
    calls = iter(range(10))
    with pytest.raises(ClosureError):
        optimizer.step(lambda: (x**2).sum() if next(calls) < 2 else x**2)
    assert plain([x, optimizer.state_dict()]) == before


def test_a_zero_dimensional_numpy_loss_in_trials() -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = SLS([x], 0.1)
    optimizer.step(lambda: (x**2).sum() if torch.is_grad_enabled() else (x**2).sum().numpy())
    assert optimizer.param_groups[0]["step_size"] > 0.0


# ------------------------------------------------------------------------------------------------ gradients of others


@every_class
def test_gradients_of_every_tensor_are_as_before(info: OptimizerInfo) -> None:
    hyper = nn.Parameter(torch.zeros(3))
    model, other = net(), nn.Linear(3, 3)
    outer = torch.optim.Adam([hyper, *other.parameters()])
    tensors: Any = [hyper, *model.parameters(), *other.parameters()]
    for k, p in enumerate(tensors):
        p.grad = torch.full_like(p, float(k)) if k % 3 else None
    held: Any = [(p.grad, None if p.grad is None else p.grad.clone()) for p in tensors]
    optimizer = info.make([*model.first.parameters(), *model.norm.parameters()], 10.0)
    x, target = batches(1)[0]

    def closure() -> Tensor:
        outer.zero_grad()
        optimizer.zero_grad(set_to_none=False)
        model.zero_grad()
        loss = nn.functional.cross_entropy(other(model(x) * hyper.exp()), target)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        for p, (grad, value) in zip(tensors, held, strict=True):
            assert p.grad is grad
            assert grad is None or torch.equal(grad, value)
    outer.zero_grad()  # outside of closures it does what it says
    assert hyper.grad is None


def test_backwards_of_other_threads_are_their_own() -> None:
    x, y = (nn.Parameter(torch.tensor([3.0, 2.0])) for _ in range(2))
    y.grad = torch.zeros(2)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        (y**2).sum().backward()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def closure() -> Tensor:
        inside.set()
        assert done.wait(10)
        loss = (x**2).sum()
        loss.backward()
        return loss

    SPSB([x], 0.1).step(closure)
    thread.join()
    assert y.grad.tolist() == [6.0, 4.0]
    assert x.grad is None


def test_two_optimizers_in_two_threads() -> None:
    ready = threading.Barrier(2, timeout=10)
    errors: list[BaseException] = []

    def work(k: int, x: nn.Parameter) -> None:
        try:
            optimizer = SPSB([x], 0.1)
            for _ in range(5):

                def closure() -> Tensor:
                    ready.wait()
                    loss = (x**2).sum()
                    loss.backward()
                    if k == 0:
                        ready.wait()  # the other one finishes first
                    return loss

                optimizer.step(closure)
                if k == 1:
                    ready.wait()
            assert x.grad is None
        except BaseException as error:
            errors.append(error)

    params = [nn.Parameter(torch.tensor([3.0, 2.0])) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(k, p)) for k, p in enumerate(params)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert params[0].tolist() == params[1].tolist()
    assert torch.autograd.backward is ORIGINAL_BACKWARD


# ------------------------------------------------------------------------------------------------ autocast


@every_class
def test_autocast_around_and_inside(info: OptimizerInfo) -> None:
    results = []
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).float()
        optimizer = info.make(model.parameters(), 10.0)
        x, target = batches(1)[0]
        x = x.float()

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.cross_entropy(model(x).float(), target)

        for _ in range(3):
            if around:
                with torch.autocast("cpu", torch.bfloat16):
                    optimizer.step(closure)
                    inside = nn.functional.cross_entropy(model(x).float(), target)
                assert torch.equal(inside, closure())  # no stale cast of the weights is left behind
            else:
                optimizer.step(closure)
        results.append(model.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@every_search
def test_random_state_is_that_of_the_first_evaluation_alone(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], 1.0)

    def closure() -> Tensor:
        torch.rand(1 if torch.is_grad_enabled() else 5)  # trials draw more
        return (x**2).sum()

    torch.manual_seed(0)
    torch.rand(1)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


class BackwardInside(torch.autograd.Function):
    """x^2 by a backward of its own, as reentrant checkpointing does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        inner = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            (inner**2).backward(gradients[0])
        assert inner.grad is not None
        return inner.grad


@every_class
@pytest.mark.parametrize("backwards", [0, 1, 3])
def test_a_backward_inside_a_backward_is_left_alone(info: OptimizerInfo, backwards: int) -> None:
    x, y = (nn.Parameter(torch.tensor([3.0, 2.0])) for _ in range(2))
    one, two = info.make([x]), info.make([y])

    def closure() -> Any:
        losses = [BackwardInside.apply(y).sum() / max(backwards, 1) for _ in range(max(backwards, 1))]
        for loss in losses[:backwards]:
            loss.backward()
        return losses[0] if backwards < 2 else torch.stack(losses).sum().item()

    one.step(lambda: (x**2).sum())
    two.step(closure)
    torch.testing.assert_close(x, y)
