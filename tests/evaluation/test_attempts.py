"""An arithmetic error in a trial rejects the trial; at the point itself, or in every trial, it is raised."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, OneStepBiSLS, SPSMax
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.optim.state import RoleState
from tests.optim.helpers import plain

_BOUND = 0.5


def _cholesky(s: Tensor) -> Tensor:
    torch.linalg.cholesky((s.detach() - _BOUND) * torch.eye(2))
    return (s - 1.0).square()


def _distribution(s: Tensor) -> Tensor:
    return torch.distributions.Gamma(s - _BOUND, 1.0, validate_args=True).mean + (s - 1.0).square()


def _overflow(s: Tensor) -> Tensor:
    math.exp(1e12 * (_BOUND - float(s.detach())))
    return (s - 1.0).square()


def _division(s: Tensor) -> Tensor:
    1 / int(float(s.detach()) > _BOUND)
    return (s - 1.0).square()


def _floating(s: Tensor) -> Tensor:
    if float(s.detach()) < _BOUND:
        raise FloatingPointError("underflow")
    return (s - 1.0).square()


_LOSSES: list[Callable[[Tensor], Tensor]] = [_cholesky, _distribution, _overflow, _division, _floating]
_RULES: list[Callable[[Any], Any]] = [
    lambda p: SLS(p, 1e4),
    lambda p: SLSB(p, 1e4),
    lambda p: SLSB(p, lower_bound=-1e4),
    lambda p: SPSB(p, lower_bound=-1e4),
    lambda p: SPSMax(p, lower_bound=-1e4),
]


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("rule", range(len(_RULES)))
def test_a_trial_out_of_the_domain_is_rejected(loss: Callable[[Tensor], Tensor], rule: int) -> None:
    s = torch.tensor(3.0, requires_grad=True)
    optimizer = _RULES[rule]([s])
    optimizer.step(lambda: loss(s))
    assert optimizer.record.trials > 1 and optimizer.record.moved
    assert _BOUND <= s.item() < 3.0


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("rule", range(len(_RULES)))
def test_at_the_point_itself_it_is_raised_and_leaves_no_trace(loss: Callable[[Tensor], Tensor], rule: int) -> None:
    s = torch.tensor(3.0, requires_grad=True)
    optimizer = _RULES[rule]([s])
    optimizer.step(lambda: loss(s))
    with torch.no_grad():
        s.fill_(-1.0)
    before, random = plain(optimizer.state_dict()), torch.get_rng_state()
    with pytest.raises((ArithmeticError, ValueError, torch.linalg.LinAlgError)):
        optimizer.step(lambda: loss(s))
    assert s.item() == -1.0
    assert plain(optimizer.state_dict()) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("error", [ValueError("data"), ZeroDivisionError("data")])
def test_what_every_trial_raises_is_not_of_their_length(error: Exception) -> None:
    s = torch.tensor(3.0, requires_grad=True)
    optimizer, calls = SLS([s]), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if calls[0] > 1:
            raise error
        return s.square()

    before = plain(optimizer.state_dict())
    with pytest.raises(type(error), match="data"):
        optimizer.step(closure)
    assert s.item() == 3.0 and plain(optimizer.state_dict()) == before


def test_other_errors_of_a_trial_are_raised_at_once() -> None:
    for error in (OptionError("of an inner optimizer"), KeyError("name"), RuntimeError("out of memory")):
        s = torch.tensor(3.0, requires_grad=True)
        optimizer, calls = SLS([s]), [0]

        def closure(s: Tensor = s, calls: list[int] = calls, error: Exception = error) -> Tensor:
            calls[0] += 1
            if calls[0] > 1:
                raise error
            return s.square()

        with pytest.raises(type(error)):
            optimizer.step(closure)
        assert s.item() == 3.0 and calls[0] == 2


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("cls", [BiSLS, OneStepBiSLS])
def test_an_upper_trial_out_of_the_domain_is_rejected(cls: Any, loss: Callable[[Tensor], Tensor]) -> None:
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    inner = SLS([y])
    outer = cls([x], 1e4, lower=inner)

    def lower() -> Tensor:
        return (y - x).square()

    def upper() -> Tensor:
        return loss(x) + 0.01 * y.square()

    for _ in range(3):
        inner.step(lower)
    assign([x], implicit(upper, lower, [x], [y]))
    outer.step(upper)
    assert outer.record.trials > 1 and outer.record.moved and _BOUND <= x.item() < 3.0
    with torch.no_grad():
        x.fill_(-1.0)
    before = plain(outer.state_dict())
    with pytest.raises((ArithmeticError, ValueError, torch.linalg.LinAlgError)):
        outer.step(upper)
    assert x.item() == -1.0 and plain(outer.state_dict()) == before


class _Check:
    """A check of the model that cannot be computed far away."""

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, point: Any, state: RoleState) -> Any:
        def check(step: float, slack: float, model: Any, place: Any) -> bool:
            if step > 1.0:
                raise FloatingPointError("far away")
            return True

        return check

    def commit(self, point: Any, check: Any, state: RoleState) -> RoleState:
        return RoleState()


def test_a_check_that_cannot_be_computed_at_a_trial_rejects_it() -> None:
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    inner = SLS([y])
    outer: Any = BiSLS([x], 8.0, lower=inner, curvature=_Check(), c=0.1)

    def upper() -> Tensor:
        return 0.01 * x.square() + 0.0 * y

    inner.step(lambda: (y - x).square())
    x.grad = 0.02 * x.detach()
    outer.step(upper)
    assert outer.record.step_size == 1.0 and outer.record.trials == 4
