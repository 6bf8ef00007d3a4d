"""The duration of a lower loop that nothing counts, from what it does to y."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, Lanczos, implicit
from adaptive_bilevel.hypergradient.loop_time import loop_time, observe, observed, restore_loop, saved_loop, watch
from adaptive_bilevel.hypergradient.observed_loop import Course, ObservedLoop
from adaptive_bilevel.hypergradient.spectrum import flowed

START = {"begins at y": 0.0, "begins anew": 1.0, "begins at the prediction": 2.0}


class Quadratic:
    """g = y^T H y / 2 - y^T C x of 12 variables with a condition of 1e3, f = |y - c|^2 / 2, and loops of descent."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, _ = torch.linalg.qr(draw(12, 12))
        self.H = (q * torch.logspace(-3, 0, 12, dtype=torch.float64)) @ q.T
        self.C, self.c = draw(12, 12), draw(12)
        self.x = torch.zeros(12, dtype=torch.float64, requires_grad=True)

    def f(self, y: Tensor) -> Tensor:
        return 0.5 * (y - self.c).square().sum()

    def g(self, y: Tensor) -> Tensor:
        return 0.5 * y @ self.H @ y - y @ self.C @ self.x

    def run(self, y: Tensor, rate: float, steps: int) -> Tensor:
        for _ in range(steps):
            y = y - rate * (self.H @ y - self.C @ self.x.detach())
        return y.detach()


@pytest.mark.parametrize("time", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("way", START)
def test_the_estimate_is_within_a_factor_of_2(way: str, time: float) -> None:
    """Of what the loops last: ten steps of a tenth of it, but for long ones, whose steps are of .5."""
    task, steps = Quadratic(), max(10, round(time / 0.5))
    outer = BiSLS([task.x], momentum=False)
    first = y = torch.zeros(12, dtype=torch.float64)
    for _ in range(8):
        y = task.run(first if way == "begins anew" else y, time / steps, steps)
        leaf = y.requires_grad_()
        (task.x.grad,) = implicit(lambda: task.f(leaf), lambda: task.g(leaf), [task.x], [leaf])
        outer.step(task.f, lower=(leaf, task.g))
        y = (outer.answer if way == "begins at the prediction" else leaf).detach()
    after = task.run(first if way == "begins anew" else y, time / steps, steps)
    loop = observed(outer.lower.tensors())
    assert loop is not None
    found = loop.ask([after])
    assert found >= 0.45 * time
    if time < 30.0 and way != "begins at the prediction":  # there, what is left to move is the same for longer loops
        assert found <= 2.3 * time


def loop_of(durations: int = 28) -> tuple[ObservedLoop, Course]:
    loop = ObservedLoop()
    times = loop.durations(1.0)
    assert len(times) == durations
    flow = flowed(times, torch.tensor([1.0, 0.0], dtype=torch.float64)).sum(1)
    return loop, Course([torch.ones(2)], 0.0, flow, torch.zeros_like(flow), torch.zeros_like(flow))


def test_nothing_is_known_before_a_loop_was_seen_and_each_step_counts_once() -> None:
    loop, course = loop_of()
    y = [torch.zeros(2)]
    assert loop.ask(y) == math.inf
    loop.expect(y, course, 1.0)
    moved = [torch.full((2,), 0.5 * float(flowed(torch.tensor([0.5]), torch.tensor([1.0, 0.0])).sum()))]
    assert loop.ask(moved) == 0.5
    assert loop.ask([torch.full((2,), 100.0)]) == 0.5


@pytest.mark.parametrize("moved", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(2,), (3,)])
def test_what_says_nothing_is_passed_over(moved: float, shape: tuple[int, ...]) -> None:
    loop, course = loop_of()
    loop.expect([torch.zeros(2)], course, 1.0)
    assert loop.ask([torch.full(shape, moved)]) == math.inf
    for step in (0.0, -1.0):
        loop.expect([torch.zeros(2)], course, step)
        assert loop.ask([torch.ones(2)]) == math.inf
    loop.expect([torch.zeros(2)], None)
    assert loop.ask([torch.ones(2)]) == math.inf


def test_of_durations_that_agree_alike_the_longest_counts() -> None:
    loop = ObservedLoop()
    times = loop.durations(1.0)
    solved = torch.ones_like(times)
    loop.expect([torch.zeros(1)], Course([torch.ones(1)], 0.0, solved, 0.0 * solved, 0.0 * solved), 1.0)
    assert loop.ask([torch.ones(1)]) == 64.0


def test_a_flat_direction_is_as_long_as_the_loop() -> None:
    found = flowed(torch.tensor([3.0, 1e9]), torch.tensor([0.0, -2.0]))
    torch.testing.assert_close(found, torch.tensor([[3.0, (1 - math.exp(-6.0)) / 2.0], [1e9, 0.5]]))


def two(y: list[Tensor]) -> Any:
    return [torch.optim.SGD([p], lr=0.1) for p in y]


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (two, True),
        (lambda y: torch.optim.SGD(y, lr=0.1), False),
        (lambda y: torch.optim.Adam(y, lr=0.1), False),
        (lambda y: [torch.optim.SGD(y[:1], lr=0.1), torch.optim.Adam(y[1:], lr=0.1)], False),
        (SLS, False),
    ],
    ids=["two SGD", "SGD, which is counted", "Adam", "SGD and Adam", "SLS"],
)
def test_which_loops_are_observed(make: Any, seen: bool) -> None:
    y = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    BiSLS([torch.ones(1, requires_grad=True)], lower=make(y))
    assert (observed(y) is not None) is seen


def test_other_solvers_observe_nothing() -> None:
    y = two([torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)])
    outer = BiSLS([torch.ones(1, requires_grad=True)], lower=y, solver=CG())
    assert observed(outer.lower.tensors()) is None


def test_what_is_saved_of_one_loop_does_not_take_the_place_of_a_counted_one() -> None:
    y, other = ([torch.ones(1, requires_grad=True)] for _ in range(2))
    watch(torch.optim.SGD(y, lr=0.1), y)
    observe(other)
    loop = observed(other)
    assert loop is not None and saved_loop(other) == saved_loop(y) == saved_loop([]) == {}
    loop.durations(1.0)
    restore_loop(y, saved_loop(other))
    assert observed(y) is None


class Penalties:
    """A weight decay per feature below a loop by hand: the program of many a notebook."""

    def __init__(self, direction: str, lr: float, way: str, source: Any = None) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(240, 20, generator=generator, dtype=torch.float64) * torch.logspace(-1, 0.5, 20)
        truth = torch.randn(20, generator=generator, dtype=torch.float64) * (torch.arange(20) % 4 == 0)
        signs = torch.sign(rows @ truth + torch.randn(240, generator=generator, dtype=torch.float64))
        self.train, self.valid = (rows[:120], signs[:120]), (rows[120:], signs[120:])
        self.x = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        self.y = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        self.outer = BiSLS([self.x], direction=direction, hypergradient=source)
        self.lr, self.way, self.source, self.losses = lr, way, source, list[float]()

    def f(self, y: Tensor) -> Tensor:
        rows, signs = self.valid
        return softplus(-signs * (rows @ y)).mean()

    def g(self, y: Tensor) -> Tensor:
        rows, signs = self.train
        return softplus(-signs * (rows @ y)).mean() + (self.x.exp() * y.square()).sum() / 2

    def iterate(self, times: int) -> None:
        for _ in range(times):
            y = self.y
            if self.way == "anew":
                y = torch.zeros_like(y).requires_grad_()
            for _ in range(5):
                (d,) = torch.autograd.grad(self.g(y), [y])
                if self.way == "in place":
                    with torch.no_grad():
                        y -= self.lr * d
                else:
                    y = (y - self.lr * d).detach().requires_grad_()
            if self.source is None:
                (self.x.grad,) = implicit(lambda: self.f(y), lambda: self.g(y), [self.x], [y])
            self.losses.append(float(self.outer.step(self.f, lower=(y, self.g))))
            self.y = self.outer.answer.detach().requires_grad_() if self.way == "answer" else y


@pytest.mark.filterwarnings("ignore:.*has left the minimum")
@pytest.mark.parametrize("lr", [0.1, 0.01])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("way", ["in place", "answer", "anew"])
def test_loops_by_hand_do_not_blow_up(way: str, direction: str, lr: float) -> None:
    run = Penalties(direction, lr, way)
    run.iterate(60)
    assert all(map(math.isfinite, run.losses))
    assert min(run.losses[-5:]) <= run.losses[0]


@pytest.mark.parametrize("way", ["in place", "answer"])
def test_a_resumed_run_is_the_same_to_the_bit(way: str) -> None:
    whole, part = (Penalties("sgd", 0.1, way, implicit) for _ in range(2))
    whole.iterate(8)
    part.iterate(5)
    saved = io.BytesIO()
    torch.save([part.outer.state_dict(), part.x.detach(), part.y.detach()], saved)
    saved.seek(0)
    state, x, y = torch.load(saved)
    resumed = Penalties("sgd", 0.1, way, implicit)
    with torch.no_grad():
        resumed.x.copy_(x)
    resumed.y = y.clone().requires_grad_()
    resumed.outer.load_state_dict(state)
    resumed.iterate(3)
    assert resumed.losses == whole.losses[5:]
    assert torch.equal(resumed.x, whole.x)


def test_a_copy_of_a_run_goes_its_own_way() -> None:
    run = Penalties("sgd", 0.1, "answer")
    run.iterate(4)
    other = copy.deepcopy(run)
    run.iterate(3)
    other.iterate(3)
    assert run.losses == other.losses


def test_the_horizon_of_hypergradient_and_response_is_that_of_the_loop() -> None:
    task = Quadratic()
    outer = BiSLS([task.x], hypergradient=implicit, momentum=False)
    y = torch.zeros(12, dtype=torch.float64)
    for _ in range(4):
        y = task.run(y, 0.02, 5)
        outer.step(task.f, lower=(y, task.g))
    lower = outer.lower.tensors()
    assert loop_time(lower) == pytest.approx(0.1, rel=1.0)
    basis = Lanczos().basis(lambda v: (task.H @ v[0],), (torch.ones(12, dtype=torch.float64),), loop_time(lower))
    assert basis.spectrum.horizon == pytest.approx(10 * loop_time(lower))
