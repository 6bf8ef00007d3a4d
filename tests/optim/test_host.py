"""The extension points for hosts: who takes a step without a closure, what the host has evaluated, its convex set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, final

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS
from adaptive_bilevel.errors import ClosureError, OptionError
from adaptive_bilevel.evaluation import Evaluated, Objective
from adaptive_bilevel.optim.line_search import LineSearch
from adaptive_bilevel.optim.projection import Box

AIM = torch.tensor([2.0, -0.3], dtype=torch.float64)


def loss_of(x: Tensor) -> Tensor:
    return (x - AIM).square().sum()


@final
class Loss(Objective):
    """A host's loss in a box, of which it has the gradient; half of each gradient is stepped along."""

    def __init__(self, x: Tensor, *, known: bool = True, project: Any = None) -> None:
        self.x, self.known, self.project = x, known, project
        self.calls = self.asked = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return loss_of(self.x)

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated | None:
        if not self.known:
            return None
        return Evaluated(loss_of(self.x).detach(), [2.0 * (t.detach() - AIM) for t in tensors])

    def processed(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        self.asked += 1
        return [None if g is None else 0.5 * g for g in gradients]


@final
class Framework:
    """A host: it steps every optimizer on its own loss."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def step(self, optimizer: Any) -> Any:
        return optimizer.advance(self.objective)


@final
class Refusing:
    """The host of what has no host yet."""

    def step(self, optimizer: Any) -> Any:
        raise ClosureError("tell the framework first")


class Theirs(LineSearch):
    """A host's class of a rule of this package: the records are those of the core's, the step is the base's."""

    unbound = Refusing()

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, **SLS([torch.zeros(1, requires_grad=True)], lr, **options).records)


def test_a_host_takes_a_step_without_a_closure() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer = SLS([x])
    with pytest.raises(ClosureError, match="needs a closure"):
        optimizer.step()
    objective = Loss(x)
    optimizer.host = Framework(objective)
    assert float(optimizer.step()) == float(loss_of(torch.zeros(2)))
    assert objective.calls == optimizer.evaluations.lower.values
    assert optimizer.evaluations.lower.gradients == 0
    assert objective.asked == 0
    calls = objective.calls
    optimizer.step(lambda: loss_of(x))
    assert objective.calls == calls


def test_what_a_host_does_not_know_is_evaluated_and_processed() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer, objective = SPSB([x], 0.25), Loss(x, known=False)
    optimizer.host = Framework(objective)
    optimizer.step()
    assert objective.asked == optimizer.evaluations.lower.gradients == 1
    assert torch.allclose(x.detach(), 0.25 * AIM)


def test_a_hosts_class_says_how_to_bind() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer = Theirs([x], c=0.3)
    assert optimizer.records == SLS([x], c=0.3).records
    assert Theirs([x], **optimizer.defaults).records == optimizer.records
    with pytest.raises(ClosureError, match="tell the framework first"):
        optimizer.step()
    optimizer.host = Framework(Loss(x))
    optimizer.step()
    with pytest.raises(ClosureError, match="tell the framework first"):
        copy.deepcopy(optimizer).step()


def test_a_record_can_be_replaced() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer = SLS([x], c=0.3)
    optimizer.set_record("rule", SLS([x], c=0.4).rule)
    assert optimizer.policy.c == optimizer.rule.c == 0.4  # type: ignore[attr-defined]
    assert optimizer.defaults["c"] == optimizer.param_groups[0]["c"] == 0.4
    other = SLS([x])
    other.load_state_dict(optimizer.state_dict())
    assert other.rule == optimizer.rule
    with pytest.raises(OptionError):
        optimizer.set_record("rule", SLS([x], c=2.0).rule)


@pytest.mark.parametrize("rule", [SLS, SLSB])
def test_searches_stay_in_the_set_of_a_host(rule: Any) -> None:
    """The direction goes to the projection of the longest step."""
    x = torch.tensor([0.5, 0.5], requires_grad=True)
    optimizer = rule([x])
    optimizer.host = Framework(Loss(x, project=Box(-1.0, 1.0)))
    for _ in range(30):
        optimizer.step()
        assert float(x.detach().abs().max()) <= 1.0 + 1e-12
    assert torch.allclose(x.detach(), torch.tensor([1.0, -0.3]), atol=1e-3)


def test_an_upper_search_stays_in_the_set_of_a_host() -> None:
    """As in that of its option, to the bit."""
    ends = []
    for hosted in (False, True):
        x = torch.tensor([0.5, 0.5], requires_grad=True)
        box = Box(-1.0, 1.0)
        outer = BiSLS([x], project=None if hosted else box)
        objective = Loss(x, known=False, project=box if hosted else None)
        for _ in range(20):
            x.grad = 2.0 * (x.detach() - AIM)
            outer.step(objective)
        ends.append(x.detach().clone())
        assert copy.deepcopy(outer).project == (None if hosted else box)
    assert torch.equal(*ends)
    assert torch.allclose(ends[0], torch.tensor([1.0, -0.3]), atol=1e-3)
