"""Every way to write a closure: with and without a backward of its own, in parts, under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_bilevel import SPSMax
from adaptive_bilevel.errors import ClosureError
from tests.optim.helpers import OptimizerInfo, batches, closure_of, every_class, net, snapshot


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
    assert most[0] == 1


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
