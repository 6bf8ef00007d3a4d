"""The duration of the lower loop as the horizon of `Lanczos`."""

import copy
import math
import pickle
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, Lanczos, implicit
from adaptive_bilevel.hypergradient.loop_time import LoopTime, loop_time, watch
from adaptive_bilevel.hypergradient.shared_basis import take


def tensors(size=1):
    return [torch.ones(size, requires_grad=True)]


def stepped(optimizer, times=1):
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()


def test_a_loop_ends_when_it_was_asked_for_and_another_step_follows():
    time = LoopTime()
    assert time.ask([]) == math.inf
    for size in (1.0, 2.0):
        time.step(size)
    assert time.ask([]) == time.ask([]) == 3.0
    time.step(4.0)
    assert time.ask([]) == 4.0


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"lr": 0.5}, 0.5),
        ({"lr": 0.5, "momentum": 0.9}, 5.0),
        ({"lr": 0.5, "momentum": 0.5, "dampening": 0.5}, 0.5),
        ({"lr": torch.tensor(0.5)}, 0.5),
    ],
)
def test_steps_of_gradient_descent_count(options, size):
    y = tensors()
    sgd = torch.optim.SGD(y, **options)
    assert loop_time(y) == math.inf
    watch(sgd, y)
    assert loop_time(y) == math.inf
    stepped(sgd, 3)
    assert loop_time(y) == pytest.approx(3 * size)


def test_the_largest_step_of_the_groups_counts_and_schedulers_do():
    one, two = tensors()[0], tensors()[0]
    sgd = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 1.0}])
    watch(sgd, [one, two])
    stepped(sgd)
    sgd.param_groups[1]["lr"] = 2.0
    stepped(sgd)
    assert loop_time([one, two]) == 3.0


def test_an_optimizer_that_two_upper_ones_watch_counts_once():
    y = tensors()
    sgd = torch.optim.SGD(y, lr=1.0)
    for _ in range(2):
        BiSLS(tensors(), lower=sgd)
    stepped(sgd)
    assert loop_time(y) == 1.0


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, SLS])
def test_other_rules_are_no_limit(make):
    y = tensors()
    optimizer = make(y)
    BiSLS(tensors(), lower=optimizer)
    optimizer.step(lambda: (y[0] ** 2).sum())
    assert loop_time(y) == math.inf


def test_several_optimizers_and_other_solvers_are_not_watched():
    first, second = tensors(), tensors()
    optimizers = [torch.optim.SGD(y, lr=1.0) for y in (first, second)]
    BiSLS(tensors(), lower=optimizers)
    BiSLS(tensors(), lower=optimizers[0], solver=CG())
    for optimizer in optimizers:
        stepped(optimizer)
    assert loop_time(first) == loop_time(second) == math.inf
    assert loop_time([]) == math.inf


@pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
def test_a_copy_of_an_optimizer_has_a_loop_of_its_own(way):
    y = tensors()
    sgd = torch.optim.SGD(y, lr=1.0)
    watch(sgd, y)
    other = way(sgd)
    stepped(other)
    assert loop_time(y) == math.inf
    theirs = other.param_groups[0]["params"]
    watch(other, theirs)
    stepped(other)
    assert loop_time(theirs) == 1.0


def test_watching_keeps_no_optimizer():
    y = tensors()
    sgd = torch.optim.SGD(y, lr=1.0)
    watch(sgd, y)
    gone = weakref.ref(sgd)
    del sgd
    assert gone() is None


@pytest.mark.parametrize(("time", "horizon"), [(math.inf, 9.0 / 4.0), (2.0, 9.0 / 4.0), (0.1, 0.3)])
def test_the_horizon(time, horizon):
    H = torch.diag(torch.tensor([1e-6, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64))
    b = torch.ones(5, dtype=torch.float64)
    inverse = Lanczos(3).basis(lambda v: (H @ v[0],), (b,), time)
    largest = inverse.largest
    assert inverse.spectrum.horizon == pytest.approx(horizon * (4.0 / largest if horizon > 1.0 else 1.0))


def test_the_horizon_of_another_right_side_where_the_basis_has_seen_no_curvature():
    H = torch.diag(torch.tensor([0.0, 2.0], dtype=torch.float64))
    b, other = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    inverse = Lanczos(2).basis(lambda v: (H @ v[0],), (b,), 0.25)
    inverse.extend(lambda v: (H @ v[0],), (other,))
    assert inverse.outside == pytest.approx((1.0 - math.exp(-0.5 * 2.0)) / 2.0)


@pytest.mark.parametrize("handed", [True, False], ids=["handed over", "built anew"])
def test_hypergradient_and_response_have_the_same_horizon(handed):
    H = torch.diag(torch.logspace(-4, 0, 30, dtype=torch.float64))
    x, y = (torch.zeros(30, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f():
        return ((y - 1.0) ** 2).sum()

    def g():
        return y @ H @ y / 2 - x @ y

    inner = torch.optim.SGD([y], lr=0.1)
    outer = BiSLS([x], lower=inner)
    for _ in range(3):
        for _ in range(2):
            inner.zero_grad()
            g().backward()
            inner.step()
        v = Lanczos().basis(lambda u: (H @ u[0],), ((2.0 * (y - 1.0)).detach(),), 0.2).solution.tensors[0]
        (x.grad,) = implicit(f, g, [x], [y])
        torch.testing.assert_close(x.grad, v)  # C = -I, f_x = 0
        if not handed:
            take([y], Lanczos(), [torch.zeros_like(y)], 0.0)
        outer.step(f, g)
        assert (record := outer.record) is not None and record.slope_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_x_does_not_outrun_a_slow_loop(direction):
    """Distillation of four images below a flat loss: y takes thousands of loops, ten count."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (200,), generator=generator)
    images = means[labels] + torch.randn(200, 20, generator=generator, dtype=torch.float64)
    x = torch.zeros(4, 20, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(20, 4, dtype=torch.float64, requires_grad=True)

    def f():
        return cross_entropy(images @ y, labels)

    def g():
        return cross_entropy(x @ y, torch.arange(4)) + 0.5e-4 * (y**2).sum()

    inner = torch.optim.SGD([y], lr=0.1)
    outer = BiSLS([x], lower=inner, direction=direction)
    for _ in range(100):
        for _ in range(5):
            inner.zero_grad()
            g().backward()
            inner.step()
        (x.grad,) = implicit(f, g, [x], [y])
        outer.step(f, g)
    assert f() < 0.003  # .16 and .24 with the horizon of k products alone
