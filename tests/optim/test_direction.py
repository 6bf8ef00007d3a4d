"""Directions of somebody else's making, and tensors put in the place of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS, BiSPS, SPSMax
from adaptive_bilevel.errors import AdaptiveBilevelWarning, OptionError, TensorError
from adaptive_bilevel.optim.direction import Adam, Descent, Gradient
from adaptive_bilevel.optim.state import RoleState
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import everything, iterate
from tests.optim.helpers import every_optimizer, plain
from tests.problems import b2


class Momentum:
    """Heavy ball: searched and stepped along m = beta m + g."""

    kind = "momentum"

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = beta

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        saved = state.shared.get("ball") or [torch.zeros_like(g) for g in gradient.values]
        after = [self.beta * m + g for m, g in zip(saved, gradient.values, strict=True)]
        return Descent(lambda g: after, after, after)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Any = True) -> RoleState:
        return RoleState({"ball": descent.memory})


def parameter(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("cls", [SLS, SPSMax])
def test_a_direction_of_ones_own_is_used_as_the_builtin_one(cls: Any) -> None:
    runs = []
    for direction in ("adam", Adam((0.9, 0.999), 1e-8)):
        x = parameter(3.0, 2.0)
        optimizer = cls([x], 0.1, direction=direction)
        for _ in range(10):
            optimizer.step(lambda: (x**2 * torch.tensor([1.0, 10.0], dtype=x.dtype)).sum())
        runs.append(x.tolist())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("cls", [SLS, SPSMax])
def test_a_direction_that_ascends_moves_nothing_until_its_memory_has_turned(cls: Any) -> None:
    x = parameter(1.0)
    optimizer = cls([x], 0.1, direction=Momentum())
    optimizer.state["direction"] = {"ball": [torch.full_like(x, -100.0)]}
    outcomes: list[Any] = []
    with pytest.warns(AdaptiveBilevelWarning, match="does not descend"):
        while not outcomes or outcomes[-1] == Outcome.no_descent:
            assert x.item() == 1.0
            optimizer.step(lambda: (x**2).sum())
            outcomes.append(optimizer.record.outcome)
    assert len(outcomes) == 18, "-100 * .9^n + 2 (1 + .9 + ... + .9^(n-1)) is positive first at n = 18"
    assert x.item() < 1.0


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_an_upper_direction_that_ascends_is_recorded_and_turns(cls: Any) -> None:
    problem = b2().instance()
    inner = SLS([problem.y])
    outer = cls([problem.x], lower=inner, direction=Momentum())
    outer.state["direction"] = {"ball": [-100.0 * b2().dF(problem.x.detach())]}
    start = b2().F(problem.x.detach())
    with pytest.warns(AdaptiveBilevelWarning, match="does not descend"):
        outcomes = [iterate(inner, outer, problem, T=20).outcome for _ in range(100)]
    assert outcomes[:10] == [Outcome.no_descent] * 10 and Outcome.accepted in outcomes
    assert b2().F(problem.x.detach()) < start


def test_a_direction_is_an_option_that_is_not_saved(tmp_path: Any) -> None:
    x = parameter(3.0, 2.0)
    optimizer = SLS([x], direction=Momentum())
    optimizer.step(lambda: (x**2).sum())
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    other = SLS([x], direction=Momentum())
    other.load_state_dict(saved)
    assert plain(other.state_dict()) == plain(optimizer.state_dict())
    with pytest.raises(OptionError, match="direction"):
        SLS([x]).load_state_dict(saved)


@every_optimizer
def test_rebinding_goes_on_with_all_state(info: Any) -> None:
    def run(rebind: bool) -> Any:
        tensors = [parameter(3.0, 2.0), parameter(1.0)]
        optimizer = info.make(tensors)
        losses = []
        for k in range(8):
            if rebind and k in (2, 5):
                tensors = [t.detach().clone().requires_grad_() for t in tensors]
                optimizer.replace_parameters(tensors)
            losses.append(float(optimizer.step(lambda: (tensors[0] ** 2).sum() + (tensors[0] * tensors[1]).sum() ** 2)))
        return losses, [t.tolist() for t in tensors], plain(optimizer.state_dict())

    assert run(rebind=True) == run(rebind=False)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: [],
        lambda: [parameter(1.0, 2.0, 3.0)],
        lambda: [torch.zeros(2, dtype=torch.float32, requires_grad=True)],
        lambda: [torch.zeros(2, dtype=torch.complex128)],
    ],
)
def test_rebinding_to_other_shapes_is_refused_and_changes_nothing(wrong: Any) -> None:
    x = parameter(3.0, 2.0)
    optimizer = SLS([x], direction="adam")
    optimizer.step(lambda: (x**2).sum())
    before = everything([x], optimizer)
    with pytest.raises(TensorError, match="replace_parameters"):
        optimizer.replace_parameters(wrong())
    assert everything([x], optimizer) == before
    assert optimizer.param_groups[0]["params"][0] is x
