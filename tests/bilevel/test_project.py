"""project=: feasible at every evaluation, sufficient decrease of the projected step, and the constrained optimum."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS, OneStepBiSLS
from adaptive_bilevel.errors import OptionError, TensorError
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.optim.projection import Ball, Box, Simplex
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import EXACT, Traced
from tests.problems import Quadratic, random_qb_data, vector

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")


def clamp(tensors: Any) -> None:
    for t in tensors:
        t.clamp_(-0.5, 0.25)


BOX = (-0.5, 0.25)
SETS: dict[str, Any] = {"box": Box(*BOX), "callable": clamp, "simplex": Simplex(1.5)}


def optimum(data: Quadratic, kind: str) -> Tensor:
    """The constrained minimizer of F, by trying every set of active constraints."""
    H, n = data.ddF(), data.B.shape[0]
    g = data.problem("", torch.zeros(n), data.b).dF(torch.zeros(n))
    best, found = float("inf"), torch.zeros(n)
    choices = (None, *BOX) if kind != "simplex" else (None, 0.0)
    for fixed in itertools.product(choices, repeat=n):
        free = [i for i in range(n) if fixed[i] is None]
        x = vector([0.0 if v is None else v for v in fixed])
        if free:
            m = len(free)
            A, b = H[free][:, free], -(g + H @ x)[free]
            if kind == "simplex":
                A = torch.cat([torch.cat([A, torch.ones(m, 1)], 1), torch.tensor([[1.0] * m + [0.0]])])
                b = torch.cat([b, torch.tensor([1.5])])
            x[free] = torch.linalg.solve(A, b)[:m]
        inside = (x >= BOX[0] - 1e-12).all() and (x <= BOX[1] + 1e-12).all()
        if kind == "simplex":
            inside = (x >= -1e-12).all() and (x.sum() - 1.5).abs() < 1e-9
        value = float(0.5 * x @ H @ x + g @ x)
        if inside and value < best:
            best, found = value, x
    return found


def feasible(kind: str, x: Tensor) -> bool:
    if kind == "simplex":
        return bool((x >= 0).all() and (x.sum() - 1.5).abs() < 1e-12)
    return bool((x >= BOX[0]).all() and (x <= BOX[1]).all())


SEARCHES: dict[str, Any] = {
    "sgd": partial(BiSLS, solver=EXACT),
    "adam": partial(BiSLS, solver=EXACT, direction="adam", betas=(0.0, 0.9)),
    "step": OneStepBiSLS,
}


@pytest.mark.parametrize("start", ["inside", "corner"])
@pytest.mark.parametrize("lr", [1e3, None])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", SETS)
def test_feasible_and_decreasing(kind: str, search: str, lr: float | None, start: str) -> None:
    for seed in range(1):
        data, _, y0 = random_qb_data(seed)
        x0 = vector([0.5, 0.5, 0.5]) if kind == "simplex" else torch.zeros(3)
        if start == "corner":
            x0 = vector([1.5, 0.0, 0.0]) if kind == "simplex" else vector([-0.5, 0.25, 0.25])
        point = data.problem("", x0, y0).instance()
        inner = SLS([point.y], 1.0, lower_bound=None)
        outer: Any = SEARCHES[search]([point.x], lr, lower=inner, project=SETS[kind])
        moves = 0
        for _ in range(7):
            for _ in range(3):
                inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            x, h = point.x.detach().clone(), point.x.grad
            upper = Traced(point.upper, [point.x])
            before = float(outer.step(upper))
            assert all(feasible(kind, visited) for (visited,) in upper.points)
            assert feasible(kind, point.x.detach())
            record = outer.record
            if record.moved:
                moves += 1
                assert record.value <= before - 0.1 * record.step_size * record.slope + 1e-12
                displacement = x - upper.points[-1][0]
                assert h is not None
                if search != "step":
                    assert float(h @ displacement) == pytest.approx(record.step_size * record.slope, rel=1e-5, abs=1e-9)
        assert moves >= 1 or torch.allclose(x0, optimum(data, kind)) or search == "step"


@pytest.mark.parametrize(
    ("kind", "direction"),
    [(kind, direction) for kind in SETS for direction in ("sgd", "adam")],
)
def test_the_constrained_optimum(kind: str, direction: str) -> None:
    for seed in range(2):
        data, _, y0 = random_qb_data(seed, mu=1.0)
        x0 = vector([1.5, 0.0, 0.0]) if kind == "simplex" else vector([0.25, 0.25, 0.25])
        problem = data.problem("", x0, y0)
        point = problem.instance()
        inner = SLS([point.y], 1.0, lower_bound=None)
        betas = (0.0, 0.9)
        outer: Any = BiSLS(
            [point.x], lower=inner, project=SETS[kind], solver=EXACT, direction=direction, betas=betas, carry=True
        )
        inner.step(point.lower)
        for _ in range(40):
            with torch.no_grad():
                point.y.copy_(problem.ystar(point.x))
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            outer.step(point.upper, point.lower)
        expected = optimum(data, kind)
        assert torch.allclose(point.x.detach(), expected, atol=2e-3), (seed, point.x, expected, outer.record)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.filterwarnings("error")
def test_a_constrained_minimizer_is_a_zero_gradient(direction: str) -> None:
    """x - P(x - a d) is zero there but for rounding, of which nobody has to be warned."""
    x = vector([0.2, 0.3, 0.5]).requires_grad_()
    y = torch.zeros(3, requires_grad=True)
    cost = vector([3.0, 1.0, 2.0]) / 7.0
    inner = SLS([y])
    outer: Any = BiSLS([x], lower=inner, project=Simplex(), direction=direction, solver=EXACT)
    upper, lower = (lambda: cost @ y), (lambda: (y - x).square().sum() / 2)
    for _ in range(30):
        for _ in range(5):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y], EXACT))
        outer.step(upper)
    assert torch.allclose(x.detach(), vector([0.0, 1.0, 0.0]), atol=1e-15, rtol=0.0)
    assert outer.record.outcome is Outcome.zero_gradient


@pytest.mark.parametrize("lr", [1.0, None])
def test_momentum_stays_inside(lr: float | None) -> None:
    data, _, y0 = random_qb_data(3)
    point = data.problem("", torch.zeros(3), y0).instance()
    inner = SLS([point.y], 1.0, lower_bound=None)
    outer: Any = BiSLS([point.x], lr, lower=inner, project=Box(*BOX), direction="adam")
    moved = []
    for _ in range(20):
        inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y]))
        outer.step(point.upper)
        assert feasible("box", point.x.detach())
        moved.append(outer.record.moved)
    assert moved[0]
    assert moved[-1] or torch.allclose(point.x.detach(), optimum(data, "box"))


def test_at_the_constrained_optimum_nothing_moves() -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    inner = SLS([y], 0.1)
    inner.step(lambda: (y - x).square().sum())
    outer: Any = BiSLS([x], 1.0, lower=inner, project=Box(0.0, 1.0))
    x.grad = torch.ones(2)
    outer.step(lambda: (x + 1).square().sum() + y.square().sum())
    assert torch.equal(x, torch.zeros(2))
    assert outer.record.outcome.name == "zero_gradient"


def test_a_set_that_cuts_nothing_off_changes_no_rounding() -> None:
    ends = []
    for project in (None, Box(-100.0, 100.0)):
        data, x0, y0 = random_qb_data(3)
        point = data.problem("", x0, y0).instance()
        inner = SLS([point.y], 0.1, lower_bound=None)
        outer = BiSLS([point.x], 0.3, lower=inner, solver=EXACT, project=project)
        for _ in range(5):
            inner.step(point.lower)
            assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y], EXACT))
            outer.step(point.upper)
        ends.append(point.x.detach().clone())
    assert torch.equal(*ends)


def test_the_domain_of_the_loss_is_never_left() -> None:
    """f is not defined outside of the box: no trial may leave it by a rounding error."""
    x, y = torch.full((5,), 0.3, requires_grad=True), torch.zeros(1, requires_grad=True)
    inner = SLS([y], 0.1)
    inner.step(lambda: (y - x.sum()).square().sum())
    outer: Any = BiSLS([x], 3.7, lower=inner, project=Box(0.0, 1.0), max_trials=8)

    def upper() -> Tensor:
        assert float(x.detach().min()) >= 0.0
        return x.clamp(min=1e-300).sqrt().sum() + 0.01 * y.square().sum()

    for _ in range(6):
        x.grad = torch.linspace(0.1, 1.7, 5)
        outer.step(upper, lambda: (y - x.sum()).square().sum())
    assert float(x.detach().min()) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [lambda tensors: [t.clamp(0, 1) for t in tensors], lambda tensors: tensors[0].clamp(0, 1)],
    ids=["list", "tensor"],
)
def test_a_projection_that_returns_instead(wrong: Any) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    outer = BiSLS([x], 1.0, project=wrong)
    x.grad = torch.ones(1)
    with pytest.raises(OptionError, match=r"project=.*in place, e\.g\."):
        outer.step(lambda: x.square().sum())
    assert x.item() == 2.0


@pytest.mark.parametrize(
    "right",
    [
        lambda tensors: [t.clamp_(0, 1) for t in tensors],
        lambda tensors: tensors[0].clamp_(0, 1),
        lambda tensors: torch._foreach_clamp_max_(tensors, 1.0),
    ],
    ids=["list", "tensor", "foreach"],
)
def test_projections_that_work_in_place(right: Any) -> None:
    x = torch.tensor([1.0], requires_grad=True)
    outer: Any = BiSLS([x], 1.0, project=right)
    x.grad = -torch.ones(1)
    outer.step(lambda: (x - 3).square().sum())
    assert x.item() == 1.0
    x.grad = torch.ones(1)
    outer.step(lambda: x.square().sum())
    assert 0.0 <= x.item() < 1.0


@pytest.mark.parametrize("kind", ["box", "simplex"])
def test_the_projections_are_the_nearest_points(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    project = SETS[kind]
    for _ in range(20):
        z = 2 * torch.randn(3, 4, generator=generator)
        p = z.clone()
        project([p])
        for _ in range(20):
            other = torch.rand(3, 4, generator=generator)
            other = 1.5 * other / other.sum(-1, keepdim=True) if kind == "simplex" else other * 0.75 - 0.5
            assert float(((z - p) * (other - p)).sum()) <= 1e-12


LARGE: dict[str, Any] = {
    "box": Box(0.0, float("inf")),
    "callable": lambda tensors: [t.clamp_(min=0.0) for t in tensors],
}


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_large_entry_does_not_hide_the_others(kind: str, direction: str) -> None:
    x = torch.tensor([1e8, 1.0], dtype=torch.float32, requires_grad=True)
    outer: Any = BiSLS([x], lower=None, project=LARGE[kind], direction=direction)
    for _ in range(20):
        x.grad = None
        loss = lambda: (x[0] / 1e8 - 1).square() + (x[1] + 1).square()  # noqa: E731
        loss().backward()
        outer.step(loss)
    assert 0.0 <= float(x[1].detach()) < 1e-6


@pytest.mark.parametrize("project", [Simplex(), clamp])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_projected_groups_keep_the_ratio_of_their_rates(project: Any, direction: str, rate: float) -> None:
    x, z = vector([0.9, 0.1]).requires_grad_(), vector([0.3, 0.7] if isinstance(project, Simplex) else [0.1, 0.2])
    z.requires_grad_()
    before = z.detach().clone()
    groups = [{"params": [x], "lr": 1.0}, {"params": [z], "lr": rate}]
    outer: Any = BiSLS(groups, 1.0, lower=None, project=project, direction=direction)
    loss = lambda: 10.0 * ((x + 3.0).square().sum() + (z[0] + 2.0 - z[1]).square())  # noqa: E731
    loss().backward()
    outer.step(loss)
    assert float((z.detach() - before).abs().max()) <= 1e-3 * rate / 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_simplex_projection_of_far_points(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e20, -2e20, -1e20], [3e10, 1.0, 3e10]], dtype=dtype)
    Simplex()([x, torch.zeros(0, dtype=dtype)])
    assert torch.equal(x, torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]], dtype=dtype))


STAYING: dict[str, Any] = {
    "box": Box(*BOX),
    "ball": Ball(1.0),
    "simplex": Simplex(1.0),
    "callable": lambda tensors: [t.clamp_(-0.5, 0.25) for t in tensors],
}


@pytest.mark.parametrize("how", ["frozen", "no gradient", "lr of 0"])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", STAYING)
def test_parameters_that_do_not_move_are_not_projected(kind: str, direction: str, how: str) -> None:
    """They are a part of the set all the same: what a ball leaves to the others is what they leave of its radius."""
    x, still = vector([0.2, 0.1]).requires_grad_(), vector([0.6, 2.0] if kind != "ball" else [0.6, 0.0])
    still.requires_grad_(how != "frozen")
    before = still.detach().clone()
    groups = [{"params": [x], "lr": 1.0}, {"params": [still], "lr": 0.0 if how == "lr of 0" else 1.0}]
    outer: Any = BiSLS(groups, 1.0, lower=None, project=STAYING[kind], direction=direction)
    loss = lambda: (x - vector([3.0, 4.0])).square().sum()  # noqa: E731
    for _ in range(30):
        x.grad, still.grad = torch.autograd.grad(loss(), x)[0], torch.ones(2) if how == "lr of 0" else None
        outer.step(loss)
    assert torch.equal(still, before)
    expected = {"box": [0.25, 0.25], "callable": [0.25, 0.25], "ball": [0.48, 0.64], "simplex": [0.0, 1.0]}[kind]
    assert torch.allclose(x.detach(), vector(expected), atol=1e-6)


def test_a_ball_that_is_full_without_the_moving_ones() -> None:
    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=Ball(2.0))
    x.grad = vector([1.0, 1.0])
    outer.step(lambda: (x - 3.0).square().sum())
    assert torch.equal(x, vector([0.0, 0.0]))
    assert torch.equal(still, vector([3.0]))


def test_a_callable_that_fails_leaves_all_as_it_was() -> None:
    def project(tensors: Any) -> None:
        for t in tensors:
            t.fill_(7.0)
        raise ValueError("no")

    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=project)
    x.grad = vector([1.0, 1.0])
    with pytest.raises(ValueError, match="no"):
        outer.step(lambda: x.square().sum())
    assert torch.equal(x, vector([0.5, 0.5]))
    assert torch.equal(still, vector([3.0]))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["box", "ball", "simplex"])
@pytest.mark.filterwarnings("error")
def test_a_start_outside_of_the_set(kind: str, search: str) -> None:
    x, y = vector([2.0, 5.0, 3.0]).requires_grad_(), torch.zeros(3, requires_grad=True)
    target = vector([0.9, 0.1, 0.4]) if kind != "box" else vector([0.2, 0.1, -0.4])
    inner = SLS([y])
    outer: Any = SEARCHES[search]([x], 1.0, lower=inner, project=STAYING[kind])
    upper, lower = (lambda: (y - 0.5 * target).square().sum()), (lambda: (y - x / 2).square().sum())
    for k in range(40):
        inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y], EXACT))
        visited = Traced(upper, [x])
        outer.step(visited)
        inside = x.detach().clone()
        STAYING[kind]([inside])
        assert torch.allclose(inside, x.detach(), rtol=0.0, atol=1e-15)
        assert not any(torch.equal(point, vector([2.0, 5.0, 3.0])) for (point,) in visited.points), k
    nearest = target.clone()
    STAYING[kind]([nearest])
    assert torch.allclose(x.detach(), nearest, atol=1e-3)


def test_a_start_outside_is_put_back_with_a_step_that_leaves_no_trace() -> None:
    x = vector([2.0, 5.0]).requires_grad_()
    outer: Any = BiSLS([x], 1.0, lower=None, project=Ball(1.0))
    x.grad = vector([1.0, 1.0])
    outer.step(lambda: x.sum() * float("nan"))
    assert outer.record.outcome is Outcome.non_finite
    assert torch.equal(x, vector([2.0, 5.0]))


@pytest.mark.parametrize("lower_bound", [0.0, None])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["ball", "callable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("error")
def test_what_rounding_leaves_of_a_move_is_a_zero_gradient(
    dtype: torch.dtype, kind: str, direction: str, lower_bound: float | None
) -> None:
    """At the solution on a ball <h, x - P(x - a h)> is rounding of x, of either sign; here f is 0 there."""
    for seed in range(4):
        target = 3 * torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x = torch.zeros(20, dtype=dtype, requires_grad=True)
        project: Any = Ball(1.0) if kind == "ball" else lambda tensors: Ball(1.0)(tensors)
        lr = None if lower_bound == 0.0 else 1.0
        outer: Any = BiSLS([x], lr, lower=None, project=project, direction=direction, lower_bound=lower_bound)
        for _ in range(12):
            loss = lambda: target.norm() - (target * x).sum()  # noqa: E731
            x.grad = torch.autograd.grad(loss(), x)[0]
            outer.step(loss)
        assert outer.record.outcome is Outcome.zero_gradient, seed
        assert torch.allclose(x.detach(), target / target.norm(), atol=4 * torch.finfo(dtype).eps, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [None, *STAYING])
def test_first_trials_beyond_the_dtype(kind: str | None, dtype: torch.dtype) -> None:
    x = torch.tensor([0.25, 0.1], dtype=dtype, requires_grad=True)
    project, target = STAYING.get(str(kind)), torch.tensor([1.0, 2.0], dtype=dtype)
    most = 1e4 * float(torch.finfo(dtype).max) if dtype is not torch.float64 else 1e300
    outer: Any = BiSLS([x], most, lower=None, project=project, lower_bound=None, max_trials=2000)
    loss = lambda: (x - target).float().square().sum()  # noqa: E731
    for _ in range(40):
        x.grad = torch.autograd.grad(loss(), x)[0]
        outer.step(loss)
    expected = {"None": [1.0, 2.0], "box": [0.25, 0.25], "callable": [0.25, 0.25], "simplex": [0.0, 1.0]}
    goal = torch.tensor(expected.get(str(kind), [0.2**0.5, 0.8**0.5]), dtype=dtype)
    assert torch.allclose(x.detach(), goal, atol=max(2e-3, 2.0 * torch.finfo(dtype).eps ** 0.5))


def test_a_simplex_of_numbers() -> None:
    x, z = vector([0.5, 0.7]).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    outer: Any = BiSLS([x, z], 1.0, lower=None, project=Simplex())
    x.grad, z.grad = torch.ones(2), torch.ones(())
    with pytest.raises(TensorError, match=r"shape \(\).*last dimension.*torch\.zeros\(3\)"):
        outer.step(lambda: x.square().sum() + z)
    assert torch.equal(x, vector([0.5, 0.7]))
    assert z.item() == pytest.approx(0.3)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", STAYING)
def test_empty_tensors_among_others(kind: str, direction: str) -> None:
    x, none = vector([0.2, 0.1]).requires_grad_(), torch.zeros(0, requires_grad=True)
    outer: Any = BiSLS([none, x], lower=None, project=STAYING[kind], direction=direction)
    for _ in range(10):
        x.grad, none.grad = 2.0 * (x.detach() - 0.2), torch.zeros(0)
        outer.step(lambda: (x - 0.2).square().sum() + none.sum())
    assert torch.allclose(x.detach(), vector([0.5, 0.5] if kind == "simplex" else [0.2, 0.2]), atol=1e-3)


FAR: list[tuple[Any, list[float], list[float]]] = [
    (Box(0.0, 1e300), [-1.0, 2.0], [0.0, 2.0]),
    (Box(-1e300, 1.0), [-1.0, 2.0], [-1.0, 1.0]),
    (Ball(1.0), [3e4, 4e4], [0.6, 0.8]),
    (Ball(1.0), [3e37, 4e37], [0.6, 0.8]),
    (Ball(5e-30), [3e-29, 4e-29], [3e-30, 4e-30]),
    (Simplex(1e-300), [1.0, 2.0], [0.0, 0.0]),
    (Simplex(1.0), [torch.nan, 2.0], [torch.nan, torch.nan]),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("project", "far", "near"), FAR, ids=str)
def test_projections_beyond_the_dtype(project: Any, far: list[float], near: list[float], dtype: torch.dtype) -> None:
    x, expected = torch.tensor(far, dtype=dtype), torch.tensor(near, dtype=dtype)
    if x.isinf().any():
        pytest.skip("no number of this dtype")
    project([x])
    assert torch.allclose(x, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reach", [1.0, 2e4, 2e38])
def test_the_simplex_projection_of_many_entries(reach: float, dtype: torch.dtype) -> None:
    """Sums over 20000 entries leave float16, and those of large ones every dtype; bfloat16 counts to 256."""
    if reach > torch.finfo(dtype).max:
        pytest.skip("no number of this dtype")
    x = torch.linspace(-reach, 0.0, 20000).to(dtype)
    x[:3] = 0.5 * torch.arange(3)
    expected = x.double()
    Simplex(1.0)([x])
    Simplex(1.0)([expected])
    assert torch.allclose(x.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert x.count_nonzero() == expected.count_nonzero()


def test_a_ball_of_any_size_with_some_that_stay() -> None:
    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=Ball(1e200))
    for _ in range(3):
        x.grad = 2.0 * (x.detach() - 3.0)
        outer.step(lambda: (x - 3.0).square().sum())
    assert torch.allclose(x.detach(), vector([3.0, 3.0]))


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["box", "callable"])
def test_many_entries_of_a_short_dtype_move(kind: str, direction: str) -> None:
    """A sum of |h x| over them leaves float16, and is no sign that all of a move is rounding."""
    x = torch.full((20000,), 0.25, dtype=torch.float16)
    x[:10000] = -0.25
    x.requires_grad_()
    outer: Any = BiSLS([x], 1.0, lower=None, project=STAYING[kind], direction=direction)
    x.grad = torch.full_like(x.detach(), 20.0)
    outer.step(lambda: 20.0 * (x.float() + 1.0).sum())
    assert outer.record.moved
