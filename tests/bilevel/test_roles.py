"""Roles as users write them: each is one class, and what it raises leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adaptive_bilevel import BiSLS
from adaptive_bilevel.bilevel import Mix, MomentumContext, PaceContext, Point, ResponseModel, RoleState, Unanswered
from adaptive_bilevel.bilevel.diagnosis import SlopeDiagnosis
from adaptive_bilevel.bilevel.model_check import CurvatureCheck
from adaptive_bilevel.bilevel.momentum import Predictive
from adaptive_bilevel.bilevel.pace import EveryStep
from adaptive_bilevel.bilevel.prediction import Always, BestShare
from adaptive_bilevel.bilevel.response import Tangent
from adaptive_bilevel.evaluation.vectors import dot
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.direction import Plain
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import everything, iterate, lower_search
from tests.optim.helpers import plain
from tests.problems import random_qb

# ------------------------------------------------------------------------------------------------ a newcomer's classes


class HeavyBall:
    """b_k = h_k + weight b_{k-1}, stepped along in the direction's metric."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, context: MomentumContext, state: RoleState) -> Mix:
        pairs = zip(context.gradient.values, state.each, strict=True)
        balls = [h + self.weight * own.get("ball", torch.zeros_like(h)) for h, own in pairs]
        return Mix(lambda: context.descent.precondition(balls), memory=balls)

    def commit(self, context: MomentumContext, mix: Mix, state: RoleState) -> RoleState:
        return RoleState(each=[{"ball": ball.clone()} for ball in mix.memory])


class Fixed:
    """y does not answer: phi(a) = f(x - a d, y)."""

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, point: Point, path: Any, redirect: Any, state: RoleState) -> ResponseModel:
        return Unanswered(path, dot(point.f_x, path.along))

    def commit(self, point: Point, model: ResponseModel, state: RoleState) -> RoleState:
        return RoleState()


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_heavy_ball_in_the_place_of_the_mean(direction: str) -> None:
    """It steps along the sum of hypergradients, it is saved, and what is loaded goes on bitwise."""
    problem = random_qb(3)
    point = problem.instance()
    inner = lower_search(point.y)
    outer = BiSLS([point.x], lower=inner, direction=direction, momentum=HeavyBall(0.5))
    start, ball = problem.F(point.x.detach()), torch.zeros_like(point.x)
    for k in range(12):
        if k == 6:
            inner2, outer2 = (
                lower_search(point.y),
                BiSLS([point.x], lower=lower_search(point.y), direction=direction, momentum=HeavyBall(0.5)),
            )
            inner2.load_state_dict(copy.deepcopy(inner.state_dict()))
            outer2.load_state_dict(copy.deepcopy(outer.state_dict()))
            assert plain(outer2.state_dict()) == plain(outer.state_dict())
            inner, outer = inner2, outer2
            outer.bind(inner)
        before = point.x.detach().clone()
        record = iterate(inner, outer, point, T=4)
        assert point.x.grad is not None
        ball = point.x.grad + 0.5 * ball
        assert torch.equal(outer.state[point.x]["momentum"]["ball"], ball)
        if direction == "sgd" and record.moved:
            torch.testing.assert_close(before - point.x.detach(), record.step_size * ball)
    assert problem.F(point.x.detach()) < start


def test_a_response_that_leaves_y_where_it_is() -> None:
    """The search then is that of f(., y): its slope is the partial one, no product is taken, and y stays."""
    x, y = torch.tensor([3.0, -2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    inner = torch.optim.SGD([y], lr=0.1)
    outer = BiSLS([x], lower=inner, momentum=False, response=Fixed())
    for _ in range(10):
        x.grad = 2 * x.detach()
        value = float(outer.step(lambda: (x**2).sum() + y.square().sum(), lambda: ((y - x.sum()) ** 2).sum()))
        record = outer.record
        assert record is not None and record.slope == pytest.approx(4 * (value - 1.0), abs=1e-12)
    assert y.item() == 1.0
    assert float(x.detach().norm()) < 1e-3
    assert outer.evaluations.lower.cost == 0


class EverySecond:
    """A search in every second step; the steps between are as long as the last one."""

    keeps = True

    def init(self) -> RoleState:
        return RoleState({"count": 0})

    def due(self, context: PaceContext, state: RoleState) -> bool:
        return state.shared["count"] % 2 == 0

    def propose(self, context: PaceContext, state: RoleState) -> float | None:
        return None if context.due else context.scale.previous

    def regrets(self, context: PaceContext, state: RoleState) -> None:
        return None

    def commit(self, context: PaceContext, record: Any, state: RoleState) -> RoleState:
        return RoleState({"count": state.shared["count"] + 1})


def test_a_pace_that_searches_every_second_step() -> None:
    point = random_qb(3).instance()
    inner = lower_search(point.y)
    outer = BiSLS([point.x], lower=inner, pace=EverySecond())
    steps, trials = list[float](), list[int]()
    for _ in range(8):
        record = iterate(inner, outer, point, T=2)
        assert record.outcome == (Outcome.kept if len(steps) % 2 else Outcome.accepted)
        steps.append(record.step_size)
        trials.append(record.trials)
    assert trials[1::2] == [0] * 4 and min(trials[::2]) >= 1
    assert steps[1::2] == steps[::2]


# ------------------------------------------------------------------------------------------------ a role that raises


class Raising:
    """A role that raises in one of its methods, in one of its calls."""

    def __init__(self, role: Any, method: str, at: int) -> None:
        self.role, self.method, self.left = role, method, at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.role, name)
        if name != self.method:
            return found

        def call(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ArithmeticError(name)
            return found(*args)

        return call


ROLES: dict[str, tuple[str, Any]] = {
    "direction": ("direction", Plain),
    "response": ("response", lambda: Tangent(CG())),
    "check": ("curvature", lambda: CurvatureCheck(0.5)),
    "pace": ("pace", EveryStep),
    "momentum": ("momentum", Predictive),
    "prediction": ("carry", BestShare),
    "carried": ("carry", Always),
    "diagnosis": ("diagnosis", SlopeDiagnosis),
}
METHODS = [(role, method) for role in ROLES for method in ("propose", "commit")]
METHODS += [("pace", "due"), ("pace", "regrets")]


@pytest.mark.parametrize(("role", "method"), [*METHODS, ("prediction", "observe")])
def test_a_role_that_raises_leaves_no_trace(role: str, method: str) -> None:
    """Also half way, when other roles have committed; the next step is as if nothing had been."""
    option, make = ROLES[role]

    def levels(at: int) -> Any:
        point = random_qb(2).instance()
        inner, raising = lower_search(point.y), Raising(make(), method, at)
        options: dict[str, Any] = {} if option == "diagnosis" else {option: raising}
        outer = BiSLS([point.x], lower=inner, **options)
        if option == "diagnosis":
            outer.diagnosis = raising
        return point, inner, outer, raising

    point, inner, outer, raising = levels(3)
    usual = levels(1000)
    for _ in range(3):
        iterate(inner, outer, point, 1, CG())
        iterate(usual[1], usual[2], usual[0], 1, CG())
    inner.step(point.lower)
    usual[1].step(usual[0].lower)
    for p in (point, usual[0]):
        p.x.grad = random_qb(2).dF(p.x.detach())
    before, record = everything([point.x, point.y], inner, outer), outer.record
    with pytest.raises(ArithmeticError, match=method):
        outer.step(point.upper)
    assert everything([point.x, point.y], inner, outer) == before
    assert outer.record is record
    raising.left = 1000
    outer.step(point.upper)
    usual[2].step(usual[0].upper)
    assert plain(outer.state_dict()) == plain(usual[2].state_dict())
    assert torch.equal(point.x, usual[0].x) and torch.equal(point.y, usual[0].y)


@pytest.mark.parametrize("option", ["direction", "momentum", "carry", "curvature", "response", "pace"])
def test_a_role_is_an_option_that_is_not_saved(option: str) -> None:
    make = next(make for name, make in ROLES.values() if name == option)
    point = random_qb(2).instance()
    outer = BiSLS([point.x], lower=lower_search(point.y), **{option: make()})
    assert outer.defaults[option] == "callable"
    with pytest.raises(ValueError, match=option):
        BiSLS([point.x], lower=lower_search(point.y)).load_state_dict(outer.state_dict())
