"""A closure that goes wrong at any of its calls: everything is as it was, or as the other calls have made it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.hypergradient import assign, implicit
from tests.optim.helpers import CLASSES, plain

pytestmark = pytest.mark.filterwarnings("ignore")


class Fault(Exception):
    """Of the user's code."""


Make = Callable[[list[Tensor], Tensor], Any]


def raising(error: BaseException) -> Make:
    def fault(params: list[Tensor], loss: Tensor) -> Any:
        raise error

    return fault


def changing(change: Callable[[list[Tensor]], object]) -> Make:
    def fault(params: list[Tensor], loss: Tensor) -> Any:
        with torch.no_grad():
            change(params)
        raise Fault

    return fault


def set_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


FAULTS: dict[str, Make] = {
    "raises": raising(Fault()),
    "is interrupted": raising(KeyboardInterrupt()),
    "runs out of memory": raising(MemoryError()),
    "divides by zero": raising(ZeroDivisionError()),
    "stops an iterator": raising(StopIteration()),
    "changes a parameter, and raises": changing(lambda params: params[0].add_(1.0)),
    "changes all parameters, and raises": changing(lambda params: [p.mul_(math.nan) for p in params]),
    "changes the random state, and raises": changing(lambda params: torch.manual_seed(99)),
    "draws, and raises": changing(lambda params: torch.rand(3)),
    "sets .grad, and raises": changing(set_gradients),
    "is NaN": lambda params, loss: loss * math.nan,
    "is infinite": lambda params, loss: loss + math.inf,
    "is minus infinity": lambda params, loss: loss - math.inf,
    "has a shape": lambda params, loss: loss * torch.ones(3, dtype=loss.dtype),
    "is None": lambda params, loss: None,
    "is detached": lambda params, loss: loss.detach(),
    "is complex": lambda params, loss: loss * 1j,
}


class Trained:
    """A model with dropout and batch norm, and an optimizer of each class, two steps in."""

    def __init__(self, cls: Any) -> None:
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(4, 1)
        self.X, self.t = torch.randn(9, 3), torch.randn(9, 1)
        self.params: list[Tensor] = [*self.body.parameters(), *self.head.parameters()]
        self.upper = cls in (BiSLS, BiSPS, OneStepBiSLS)
        if self.upper:
            self.inner = SLS(self.head.parameters())
            self.optimizer = cls(self.body.parameters(), lower=self.inner)
        else:
            self.optimizer = cls(self.params)
        for _ in range(2):
            self.prepare()
            self.optimizer.step(self.loss)
        self.prepare()

    def loss(self) -> Tensor:
        return (self.head(self.body(self.X)) - self.t).square().mean() + 1e-3 * sum((p**2).sum() for p in self.params)

    def prepare(self) -> None:
        if self.upper:
            self.inner.step(self.loss)
            own = list(self.body.parameters())
            assign(own, implicit(self.loss, self.loss, own, list(self.head.parameters())))

    def everything(self) -> Any:
        return [
            [(p.detach().clone().tolist(), None if p.grad is None else p.grad.tolist()) for p in self.params],
            [b.tolist() for b in self.body.buffers()],
            torch.get_rng_state().tolist(),
            plain(self.optimizer.state_dict()),
        ]


ALL = [*(info.cls for info in CLASSES), BiSLS, BiSPS, OneStepBiSLS]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_call_is_undone(cls: Any, name: str) -> None:
    for index in range(6):
        trained = Trained(cls)
        calls, before = itertools.count(), trained.everything()

        def closure(trained: Trained = trained, calls: Any = calls, index: int = index) -> Any:
            call, loss = next(calls), trained.loss()
            return FAULTS[name](trained.params, loss) if call == index else loss

        try:
            trained.optimizer.step(closure)
        except BaseException:
            after = trained.everything()
            assert after == before, (index, next(calls))
        else:
            if next(calls) <= index:
                break  # the step has no such call
        expected = trained.optimizer.step(trained.loss)
        assert math.isfinite(float(expected))
