"""Gradients of all tensors are as before a step, those of other threads included."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_bilevel import SPSB
from tests.evaluation.helpers import ORIGINAL_BACKWARD
from tests.optim.helpers import OptimizerInfo, batches, every_class, net


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
