"""Samples that support a part of x only: how large that part is, and what it says of the check of the tangent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.bilevel import ModelCheck, Point, StepCheck
from adaptive_bilevel.bilevel.model_check import CurvatureCheck, TangentCheck
from adaptive_bilevel.bilevel.sample_support import Support, support
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.optim.direction import Descent, Gradient
from adaptive_bilevel.optim.state import RoleState, advanced

EXACT = CG(max_iterations=10, tolerance=0.0)


def after(sample: Support, entries: Any, kept: Any) -> dict[str, Any]:
    """What is kept after a step, computed."""
    news = advanced(RoleState(kept), RoleState(sample.after(entries, kept)))
    return dict(news.shared)


def shares(supports: list[list[int]], size: int) -> list[float]:
    """The shares of hypergradients that are not zero in these entries, one after the other."""
    x, kept, found = torch.zeros(size), dict[str, Any](), []
    for entries in supports:
        h = torch.zeros(size)
        h[entries] = -2.0
        sample = support([(x, h)], kept)
        assert support([(x, h)], kept).share == sample.share  # nothing is kept before
        kept = after(sample, [(x, h)], kept)
        found.append(sample.share)
    return found


def test_an_epoch_of_disjoint_samples() -> None:
    """The first epoch counts up; whether later ones come in the same order does not matter."""
    epochs = [[[0], [1], [2], [3]], [[3], [1], [0], [2]]] * 5
    found = shares([s for epoch in epochs for s in epoch], 4)
    assert found == [1.0, 1 / 2, 1 / 3, *[1 / 4] * 37]


def test_samples_drawn_with_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    found = shares([torch.randint(100, (10,), generator=generator).tolist() for _ in range(400)], 100)
    assert all(0.07 <= share <= 0.1 for share in found[100:])


@pytest.mark.parametrize("wide", [1, 8])
def test_what_is_zero_from_now_on_is_forgotten(wide: int) -> None:
    """Entries that were not zero once only, or for a while; full batches, and samples of an eighth."""
    alive = [list(range(i, 8, wide)) for i in range(wide)]
    found = shares([list(range(64)) if k < 20 else alive[k % wide] for k in range(200)], 64)
    assert found[19] == 1.0 and found[20] == len(alive[0]) / 64
    assert found[100:] == [1 / wide] * 100


def test_parameters_out_of_the_sample_and_others_than_before() -> None:
    x, z = torch.zeros(4), torch.zeros(2)
    both: Any = [(x, torch.ones(4)), (z, torch.ones(2))]
    kept = after(support(both, {}), both, {})
    assert support([(x, torch.ones(4)), (z, None)], kept).share == pytest.approx(4 / 6)
    assert support([(x, torch.ones(4))], kept).share == 1.0  # the other one was frozen: counting starts anew
    assert support([(x, torch.zeros(4)), (z, torch.zeros(2))], kept).share == 1.0
    assert support([], {}).share == 1.0


class Samples:
    """g_i = (y - x_i)^2 / 2 on one sample a time, f = (y - target)^2 / 2; the target drifts."""

    def __init__(self, count: int, drift: float = 0.0, **options: Any) -> None:
        self.x = torch.zeros(count, requires_grad=True)
        self.y = torch.zeros((), requires_grad=True)
        self.target, self.drift = 1.0, drift
        self.inner = SLS([self.y])
        self.outer = BiSLS([self.x], lower=self.inner, solver=EXACT, **options)

    def upper(self) -> Tensor:
        return (self.y - self.target) ** 2 / 2

    def step(self, i: int) -> None:
        def lower() -> Tensor:
            return (self.y - self.x[i]) ** 2 / 2

        self.inner.step(lower)
        assign([self.x], implicit(self.upper, lower, [self.x], [self.y], EXACT))
        self.outer.step(self.upper)
        self.target += self.drift


class WithoutShare:
    """A check that takes each sample for the whole."""

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, point: Point, state: RoleState) -> TangentCheck:
        return TangentCheck(0.5, point.scale.resumed)

    def commit(self, point: Point, check: StepCheck, state: RoleState) -> RoleState:
        return state


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("momentum", ["auto", False])
@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")  # of f = 1e-32
def test_consistent_samples_are_solved(direction: str, momentum: Any) -> None:
    """Nothing is nonlinear, so nothing is allowed: steps are as short as without a share, and x_i = 1 is found."""
    problem, whole = (
        Samples(32, direction=direction, momentum=momentum),
        Samples(32, direction=direction, momentum=momentum, curvature=WithoutShare()),
    )
    for k in range(12 * 32):
        problem.step(k % 32)
        whole.step(k % 32)
    rounding = 1e-5 if direction == "sgd" and not momentum else 0.0  # solved to 1e-32, where rounding decides
    torch.testing.assert_close(problem.x, whole.x, rtol=0.0, atol=rounding)
    assert float((problem.x.detach() - 1.0).square().mean().sqrt()) < 0.2


class Recorded:
    """A check that remembers the tolerances of another one."""

    def __init__(self, role: ModelCheck) -> None:
        self.role, self.tolerances = role, list[float]()
        self.init, self.commit = role.init, role.commit

    def propose(self, point: Point, state: RoleState) -> StepCheck:
        check: Any = self.role.propose(point, state)
        self.tolerances.append(check.tolerance)
        found: StepCheck = check
        return found


def test_a_part_of_x_is_allowed_a_larger_change() -> None:
    check = Recorded(CurvatureCheck(0.3))
    problem = Samples(4, drift=1.0, curvature=check)
    for k in range(9):
        problem.step(k % 4)
    assert check.tolerances == pytest.approx([0.3, 0.6, 0.9, *[1.2] * 6])


def test_a_step_that_is_not_finite_supports_nothing_and_a_copy_goes_on_alike() -> None:
    problem = Samples(5, drift=0.3)
    for k in range(6):
        problem.step(k % 3)
    before = copy.deepcopy(problem.outer.state["check"])  # type: ignore[index]
    problem.x.grad = torch.full((5,), math.nan)
    problem.outer.step(problem.upper)
    after: Any = problem.outer.state["check"]  # type: ignore[index]
    assert repr(after) == repr(before)
    assert after["mask"][0].tolist() == [True, True, True, False, False]

    twin = Samples(5, drift=0.3)
    twin.target = problem.target
    with torch.no_grad():
        twin.x.copy_(problem.x)
        twin.y.copy_(problem.y)
    twin.inner.load_state_dict(copy.deepcopy(problem.inner.state_dict()))
    twin.outer.load_state_dict(copy.deepcopy(problem.outer.state_dict()))
    for k in range(3, 9):
        problem.step(k % 5)
        twin.step(k % 5)
    assert torch.equal(problem.x, twin.x) and torch.equal(problem.y, twin.y)
    kept: Any = twin.outer.state["check"]  # type: ignore[index]
    assert kept["mask"][0].dtype == torch.bool


class Counting:
    """A direction with a memory of its own, under a word."""

    kind = "sgd"

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def init(self) -> RoleState:
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        return Descent(list)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Any = True) -> RoleState:
        return RoleState({"own": self.kept})


@pytest.mark.parametrize("kept", [3, torch.zeros(2)], ids=["number", "tensor"])
def test_a_direction_may_keep_numbers_and_tensors(kept: Any) -> None:
    problem = Samples(3, drift=0.3, direction=Counting(kept))
    for k in range(4):
        problem.step(k % 3)
    problem.outer.load_state_dict(copy.deepcopy(problem.outer.state_dict()))
    problem.step(1)
    assert problem.outer.record is not None and problem.outer.record.moved
    copy.deepcopy(problem.outer)


@pytest.mark.parametrize("how", ["frozen", "lr"])
def test_what_does_not_move_is_no_part_of_x(how: str) -> None:
    problem = Samples(4, drift=0.3, momentum=False)
    weight = torch.ones(20, requires_grad=how == "lr")
    problem.outer.add_param_group({"params": [weight], "lr": 0.0 if how == "lr" else 1.0})
    for k in range(8):
        weight.grad = torch.ones(20) if how == "lr" else None
        problem.step(k % 4)
    kept: Any = problem.outer.state["check"]  # type: ignore[index]
    assert [mask.numel() for mask in kept["mask"]] == [4]


@pytest.mark.filterwarnings("ignore:.*no trial step gave")
def test_nothing_is_counted_where_nothing_is_checked() -> None:
    problem = Samples(3, drift=0.3, curvature=math.inf)
    for k in range(4):
        problem.step(k % 3)
    assert "check" not in problem.outer.state
