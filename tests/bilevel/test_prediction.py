"""What the next lower loop is offered: how y answers to one unit of the step that is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.bilevel import Mix, PredictionContext, RoleState
from adaptive_bilevel.bilevel.prediction import Always, Never, Offered, prediction_of
from adaptive_bilevel.optim.direction import Gradient
from adaptive_bilevel.optim.state import advanced

BETA = 0.9


class Level:
    """A lower level that remembers what it is asked for."""

    def __init__(self, follows: bool = True) -> None:
        self.follows, self.calls = follows, list[tuple[str, float]]()

    def tensors(self) -> list[Tensor]:
        return [torch.zeros(2)]

    def upper_moved(self) -> None: ...

    def watch(self) -> None: ...

    def restart(self) -> None: ...

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        self.calls.append(("carry", step))

    def follow(self, response: Sequence[Tensor], step: float) -> None:
        self.calls.append(("follow", step))


def context(
    tangent: Tensor | None,
    mix: Mix,
    level: Any = None,
    promised: float = 1.0,
    h: Sequence[float] = (0.0,),
    along: Sequence[float] | None = (0.0,),
) -> PredictionContext:
    gradient = Gradient([torch.zeros(len(h))], [torch.tensor(h)], [1.0])
    d = None if along is None else [torch.tensor(along)]
    lower: Any = level or Level()
    return PredictionContext(None if tangent is None else [tangent], promised, mix, BETA, lower, gradient, d)


@pytest.mark.parametrize("role", [Always(), Offered()], ids=["always", "offered"])
def test_along_the_mean_of_hypergradients_it_is_the_mean_of_tangents(role: Any) -> None:
    torch.manual_seed(0)
    state, mean, count = RoleState({}, [{}]), torch.zeros(3), 0
    for k, weight in enumerate((0.0, 1.0, 0.3, 0.7, 1.0)):
        tangent, restarted = torch.randn(3), k == 3
        mean, count = (torch.zeros(3), 0) if restarted else (mean, count)
        mean, count = BETA * mean + (1 - BETA) * tangent, count + 1
        given = context(tangent, Mix(weight=weight, averages=True, restarted=restarted))
        (response,) = role.propose(given, state)
        torch.testing.assert_close(response, (1 - weight) * tangent + weight * mean / (1 - BETA**count))
        state = advanced(state, role.commit(given, [response], state))
        assert state.shared["count"] == count


@pytest.mark.parametrize("role", [Always(), Offered()], ids=["always", "offered"])
def test_without_a_mean_it_is_the_tangent(role: Any) -> None:
    tangent = torch.ones(2)
    given = context(tangent, Mix(), promised=4.0, along=(2.0,))
    assert role.propose(given, role.init())[0] is tangent
    state = advanced(RoleState({}, [{}]), role.commit(given, [tangent], role.init()))
    assert state == RoleState({"last": [tangent], "promised": 4.0}, [{"along": torch.tensor([2.0])}])
    assert role.commit(given._replace(along=None), [tangent], role.init()) == RoleState()  # none is wanted again


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize(
    ("h", "share"),
    [
        ((2.0, 0.0), 1.0),  # the direction of then
        ((1.0, 0.0), 0.5),
        ((0.0, 1.0), 0.0),  # a tangent of another direction tells nothing of it
        ((-1.0, 3.0), -0.5),
        ((1.2, 1.6), 0.6),
    ],
)
def test_without_a_tangent_it_is_what_the_last_one_tells(h: tuple[float, float], share: float, weight: float) -> None:
    """The part of the direction that is along that of then; the mean of the tangents stays as it is."""
    role, mix = Always(), Mix(weight=weight, averages=True)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 1.0])
    state = RoleState({}, [{}])
    for tangent in (first, second):
        then = context(tangent, mix, promised=4.0, along=(2.0, 0.0))
        state = advanced(state, role.commit(then, None, state))
    kept = context(None, mix, promised=h[0] ** 2 + h[1] ** 2, h=h)
    (response,) = role.propose(kept, state) or []
    mean = (BETA * (BETA * (1 - BETA) * first + (1 - BETA) * second) + (1 - BETA) * share * second) / (1 - BETA**3)
    torch.testing.assert_close(response, (1 - weight) * share * second + weight * mean)
    assert role.commit(kept, [response], state) == RoleState()
    assert role.propose(kept, role.init()) is None  # there was none yet
    assert role.propose(kept, state._replace(each=[{}])) is None  # or not of this parameter


def test_it_is_no_longer_than_the_direction() -> None:
    """Where a convex set has cut the direction, the last one may promise more of this step than the step does."""
    state = RoleState({"last": [torch.ones(2)], "promised": 4.0}, [{"along": torch.tensor([9.0])}])
    for sign in (1.0, -1.0):
        (response,) = Always().propose(context(None, Mix(), promised=1.0, h=(sign,)), state) or []
        torch.testing.assert_close(response, torch.full((2,), 0.5 * sign))


def test_a_level_of_other_shapes_begins_anew() -> None:
    role, mix = Always(), Mix(weight=1.0, averages=True)
    state = advanced(RoleState({}, [{}]), role.commit(context(torch.ones(2), mix), None, role.init()))
    (response,) = role.propose(context(torch.full((3,), 2.0), mix), state) or []
    torch.testing.assert_close(response, torch.full((3,), 2.0))


def test_how_it_is_delivered() -> None:
    level, tangent = Level(), [torch.ones(2)]
    for role in (Always(), Offered(), Never()):
        role.deliver(context(tangent[0], Mix(), level), tangent, 0.5)
    assert level.calls == [("carry", 0.5), ("follow", 0.5)]
    assert Never().propose(context(tangent[0], Mix()), RoleState()) is None
    alone = context(tangent[0], Mix(averages=True), Level(follows=False))
    assert Offered().propose(alone, RoleState()) is None
    assert Offered().commit(alone, None, RoleState()) == RoleState()


def test_the_option_names_it() -> None:
    assert [type(prediction_of(option)) for option in ("auto", True, False)] == [Offered, Always, Never]
    own = Never()
    assert prediction_of(own) is own
