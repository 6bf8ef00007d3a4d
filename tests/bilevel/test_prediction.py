"""How y is predicted to answer to one unit of the step that is taken, and how much of that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS
from adaptive_bilevel.bilevel import Mix, PredictionContext, RoleState
from adaptive_bilevel.bilevel.prediction import Always, BestShare, Never, predicted, prediction_of
from adaptive_bilevel.hypergradient import CG, Identity, Lanczos, Neumann
from adaptive_bilevel.hypergradient.solution import LinearSolver
from adaptive_bilevel.optim.direction import Gradient
from adaptive_bilevel.optim.state import advanced

BETA = 0.9


class Level:
    """A lower level that remembers what it is asked for."""

    def __init__(self, y: Tensor | None = None) -> None:
        self.y = torch.zeros(2) if y is None else y
        self.moves = list[tuple[list[Tensor], float]]()

    def tensors(self) -> list[Tensor]:
        return [self.y]

    def upper_moved(self) -> None: ...

    limit = None

    def restart(self) -> None: ...

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        self.moves.append((list(response), step))
        self.y += step * response[0]


def context(
    tangent: Tensor | None,
    mix: Mix,
    level: Any = None,
    promised: float = 1.0,
    h: Sequence[float] = (0.0,),
    along: Sequence[float] | None = (0.0,),
    step: float = 0.5,
) -> PredictionContext:
    gradient = Gradient([torch.zeros(len(h))], [torch.tensor(h)], [1.0])
    d = None if along is None else [torch.tensor(along)]
    lower: Any = level or Level()
    return PredictionContext(None if tangent is None else [tangent], promised, mix, BETA, lower, gradient, step, d)


@pytest.mark.parametrize("role", [Always(), BestShare()], ids=["always", "by a share"])
def test_along_the_mean_of_hypergradients_it_is_the_mean_of_tangents(role: Any) -> None:
    torch.manual_seed(0)
    state, mean, count = RoleState({}, [{}]), torch.zeros(3), 0
    for k, weight in enumerate((0.0, 1.0, 0.3, 0.7, 1.0)):
        tangent, restarted = torch.randn(3), k == 3
        mean, count = (torch.zeros(3), 0) if restarted else (mean, count)
        mean, count = BETA * mean + (1 - BETA) * tangent, count + 1
        given = context(tangent, Mix(weight=weight, averages=True, restarted=restarted), Level(torch.zeros(3)))
        move = role.propose(given, state)
        torch.testing.assert_close(move.response[0], (1 - weight) * tangent + weight * mean / (1 - BETA**count))
        state = advanced(state, role.commit(given, move, state))
        assert state.shared["count"] == count


def test_without_a_mean_it_is_the_tangent() -> None:
    role, tangent = Always(), torch.ones(2)
    given = context(tangent, Mix(), promised=4.0, along=(2.0,))
    move = role.propose(given, role.init())
    assert move is not None
    assert move.response[0] is tangent
    state = advanced(RoleState({}, [{}]), role.commit(given, move, role.init()))
    assert state == RoleState({"last": [tangent], "promised": 4.0}, [{"along": torch.tensor([2.0])}])
    assert role.commit(given._replace(along=None), move, role.init()) == RoleState()  # none is wanted again


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
    move = role.propose(kept, state)
    assert move is not None
    mean = (BETA * (BETA * (1 - BETA) * first + (1 - BETA) * second) + (1 - BETA) * share * second) / (1 - BETA**3)
    torch.testing.assert_close(move.response[0], (1 - weight) * share * second + weight * mean)
    assert role.commit(kept, move, state) == RoleState()
    assert role.propose(kept, role.init()) is None  # there was none yet
    assert role.propose(kept, state._replace(each=[{}])) is None  # or not of this parameter


def test_it_is_no_longer_than_the_direction() -> None:
    """Where a convex set has cut the direction, the last one may promise more of this step than the step does."""
    state = RoleState({"last": [torch.ones(2)], "promised": 4.0}, [{"along": torch.tensor([9.0])}])
    for sign in (1.0, -1.0):
        move = Always().propose(context(None, Mix(), promised=1.0, h=(sign,)), state)
        assert move is not None
        torch.testing.assert_close(move.response[0], torch.full((2,), 0.5 * sign))


def test_a_level_of_other_shapes_begins_anew() -> None:
    role, mix = Always(), Mix(weight=1.0, averages=True)
    state = advanced(RoleState({}, [{}]), role.commit(context(torch.ones(2), mix), None, role.init()))
    move = role.propose(context(torch.full((3,), 2.0), mix), state)
    assert move is not None
    torch.testing.assert_close(move.response[0], torch.full((3,), 2.0))


@pytest.mark.parametrize(("role", "part"), [(Always(), 1.0), (BestShare(), 0.25), (Never(), 0.0)])
def test_by_how_much_y_moves(role: Any, part: float) -> None:
    """The share of earlier moves is 1/4; x that stays leaves y where it is."""
    level, tangent = Level(), torch.ones(2)
    state = advanced(RoleState({"slope": -0.5, "bend": 1.0}, [{}]), RoleState())
    news = predicted(role, context(tangent, Mix(), level), state)
    assert [step for _, step in level.moves] == ([0.5 * part] if part else [])
    if part == 0.25:
        assert news.shared["moved"][0] is tangent
        assert (news.shared["kept"], news.shared["length"], news.shared["place"]) == (0.25, 0.5, 0.25 * 0.5 * 2.0)
    still = predicted(role, context(tangent, Mix(), level, step=0.0), state)
    assert len(level.moves) == (part > 0.0)
    assert still.shared.get("moved", []) == []


@pytest.mark.parametrize(("best", "part"), [(1.0, 1.0), (1.5, 1.0), (0.25, 0.25), (0.0, 0.0), (-0.5, 0.0)])
@pytest.mark.parametrize("loop", [0.0, 0.3, 1.0])
def test_the_next_move_is_by_the_share_that_was_best(best: float, part: float, loop: float) -> None:
    """The lower loss is least at this share of the move, and the loop takes y a part of the way to there."""
    role, w, H = BestShare(), torch.tensor([1.0, -2.0]), 3.0
    level = Level(torch.tensor([0.5, 0.2]))
    y0 = level.y.clone()
    given = context(w, Mix(), level)._replace(curvature=H)
    state = advanced(RoleState({}, [{}]), predicted(role, given, RoleState({}, [{}])))
    torch.testing.assert_close(level.y, y0 + 0.5 * w)
    target = y0 + best * 0.5 * w
    level.y.lerp_(target, loop)
    share = role.observe([H * (level.y - target)], [level.y], state)
    move = role.propose(given._replace(share=share), state)
    assert move is not None
    assert move.part == pytest.approx(part, abs=1e-12)
    assert role.observe([torch.zeros(3)], [torch.zeros(3)], state) is None  # another variable


@pytest.mark.parametrize(
    ("dtype", "size", "seen"),
    [
        (torch.float64, 1e-9, False),
        (torch.float64, 1e-6, True),
        (torch.float32, 1e-2, True),
        (torch.bfloat16, 1e-2, True),
    ],
)
def test_a_move_below_the_rounding_of_y_shows_nothing(dtype: torch.dtype, size: float, seen: bool) -> None:
    role, w, y = BestShare(), torch.full((2,), size, dtype=dtype), torch.ones(2, dtype=dtype)
    given = context(w, Mix(), Level(y))._replace(curvature=1.0)
    state = advanced(RoleState({}, [{}]), predicted(role, given, RoleState({}, [{}])))
    assert (role.observe([torch.ones(2, dtype=dtype)], [y], state) is not None) == seen


def test_the_option_names_it() -> None:
    assert [type(prediction_of(option, Lanczos())) for option in ("auto", True, False)] == [BestShare, Always, Never]
    own = Never()
    assert prediction_of(own, Lanczos()) is own


@pytest.mark.parametrize(
    ("solver", "role"),
    [
        (Lanczos(), BestShare),
        (CG(), BestShare),
        (Identity(), BestShare),
        (Neumann(3, random=True), BestShare),
        (Neumann(3, 0.1), Never),
    ],
)
def test_what_the_lower_loop_does_by_itself_is_not_predicted(solver: LinearSolver, role: type) -> None:
    """A Neumann series is a number of lower steps; for `Identity` and a random draw, `CG` solves for the response."""
    x, y = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    outer = BiSLS([x], lower=torch.optim.SGD([y], lr=0.1), solver=solver)
    assert type(outer.roles.prediction) is role
    assert type(prediction_of(True, solver)) is Always
