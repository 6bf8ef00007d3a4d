"""`diagnose`: each limit of a run is named with a remedy, and a run without one is told nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SPSB, AutoSLS, BiSLS, BiSPS, diagnose
from adaptive_bilevel.errors import AdaptiveBilevelWarning, OptionError
from adaptive_bilevel.hypergradient import CG, assign, implicit
from tests.problems import random_qb


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def told(optimizer: Any, step: Callable[[], Any], steps: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            step()
    return "\n".join(diagnose(optimizer))


def bilevel(lower: Callable[[Tensor, Tensor], Tensor], **options: Any) -> tuple[Any, Any, Callable[[], None]]:
    """Return the optimizers of a toy and its iteration."""
    x, y = leaf(1.0, 0.5), leaf(0.3, -0.2)
    inner = SLS([y], lower_bound=-1e6)
    outer = BiSLS([x], lower=inner, **{"lower_bound": -10.0, **options})

    def upper() -> Tensor:
        return ((y - 1) ** 2).sum() + 0.1 * (x**2).sum()

    def iterate() -> None:
        for _ in range(3):
            inner.step(lambda: lower(x, y))
        assign([x], implicit(upper, lambda: lower(x, y), [x], [y]))
        outer.step(upper)

    return inner, outer, iterate


def test_a_good_run_is_told_nothing() -> None:
    problem = random_qb(0)
    point = problem.instance()
    inner = SLS([point.y], lower_bound=None, lr=1.0)
    outer = BiSLS([point.x], lower=inner)
    assert "no step yet" in diagnose(outer)[0]
    for _ in range(12):
        for _ in range(20):
            inner.step(point.lower)
        assign([point.x], implicit(point.upper, point.lower, [point.x], [point.y]))
        outer.step(point.upper)
    assert diagnose(outer) == [] and len(outer.history) == 12


@pytest.mark.parametrize("make", [SLS, AutoSLS], ids=lambda c: c.__name__)
def test_failed_searches(make: Any) -> None:
    w = leaf(3.0, 2.0)
    optimizer = make([w], 1.0)
    said = told(optimizer, lambda: optimizer.step(lambda: 2 * (w.detach() ** 2).sum() - (w**2).sum()), 4)
    assert "searches failed in 4 of the last 4 steps" in said and "check" in said


OUTCOMES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zero": (lambda w: (0 * w).sum() + 1, "gradient was zero in 6 of the last 6"),
    "nan": (lambda w: (w * math.nan).sum(), "not finite in 6 of the last 6"),
}


@pytest.mark.parametrize("make", [SLS, SPSB], ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", ["zero", "nan"])
def test_steps_that_moved_nothing(make: Any, case: str) -> None:
    w = leaf(3.0, 2.0)
    optimizer, (loss, words) = make([w]), OUTCOMES[case]
    assert words in told(optimizer, lambda: optimizer.step(lambda: loss(w)), 6)


def test_at_the_bound() -> None:
    w = leaf(3.0, 2.0)
    optimizer = SPSB([w], 1e-5)
    assert "raise lr=" in told(optimizer, lambda: optimizer.step(lambda: (w**2).sum()), 6)
    optimizer.param_groups[0]["lr"] = 0.0
    assert "lr is 0" in told(optimizer, lambda: optimizer.step(lambda: (w**2).sum()), 1)


def test_a_closure_that_changes() -> None:
    w, count = leaf(3.0, 2.0), iter(range(10**6))
    optimizer = SLS([w])
    said = told(optimizer, lambda: optimizer.step(lambda: (w**2).sum() + next(count)), 4)
    assert "changes from call to call" in said


def test_a_rule_whose_bound_decays_is_not_advised_to_itself() -> None:
    """Steps without a search are the bound in any case, so a larger one is not advised either."""
    x, random = leaf(1.0, 0.5), torch.Generator().manual_seed(0)
    optimizer = AutoSLS([x])

    def step() -> None:
        at = torch.randn(2, generator=random, dtype=torch.float64)
        optimizer.step(lambda: ((x - at) ** 2).sum())

    text = told(optimizer, step, 30)
    assert "samples disagree" in text and "larger batches" in text
    assert "SLSB" not in text and "raise lr" not in text


def test_samples_that_disagree() -> None:
    w = leaf(1.0)
    optimizer, targets = SLS([w]), torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = iter(targets)

    def step() -> None:
        t = next(batches)
        optimizer.step(lambda: ((w - 3 * t) ** 2).sum() + 0.5)

    assert "samples disagree" in told(optimizer, step, 40)


HESSIANS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "indefinite": (lambda x, y: (y**4 / 4 - y**2).sum() / 2 + 0.3 * (x * y).sum(), "negative curvature"),
    "singular": (lambda x, y: (y[0] - x[0]) ** 2 + 0 * y[1] * x[1], "singular Hessian"),
}


@pytest.mark.parametrize("case", HESSIANS)
def test_what_solvers_meet(case: str) -> None:
    loss, words = HESSIANS[case]
    _, outer, iterate = bilevel(loss)
    said = told(outer, iterate, 6)
    assert words in said and "of the last" in said and "regularize" in said
    assert "solver=" not in said  # it was left out already


def test_what_cg_meets_is_a_reason_for_the_default_solver() -> None:
    loss, words = HESSIANS["indefinite"]
    _, outer, iterate = bilevel(loss, solver=CG(tolerance=1e-8))
    said = told(outer, iterate, 6)
    assert words in said and "leave solver= out" in said


def test_slopes_that_disagree() -> None:
    x, y = leaf(1.0, 0.5), leaf(0.3, -0.2)
    inner = SLS([y])
    outer = BiSLS([x], lower=inner, solver=CG(tolerance=1e-8))

    def iterate() -> None:
        inner.step(lambda: ((y - x) ** 2).sum())
        x.grad = 50.0 * 2 * (x.detach() - 1)
        outer.step(lambda: ((y - 1) ** 2).sum() + 1e-3 * (x**2).sum())

    assert "hypergradient.check" in told(outer, iterate, 6)


def test_the_lower_level_is_behind() -> None:
    x, y = leaf(1.0), leaf(100.0)
    inner = SLS([y])
    outer = BiSPS([x], lower=inner)

    def iterate() -> None:
        y.data.fill_(100.0)  # a cold start, and one step
        inner.step(lambda: ((y - x) ** 2).sum())
        x.grad = x.detach() - 0.5
        outer.step(lambda: ((x - 0.5) ** 2).sum() + 0 * y.sum())

    said = told(outer, iterate, 6)
    assert "lower level is behind" in said and "more lower steps" in said


def test_below_rounding() -> None:
    w = torch.tensor([1.0], dtype=torch.float32, requires_grad=True)
    optimizer = SLS([w], lr=1e-6, max_step=1e-6)
    said = told(optimizer, lambda: optimizer.step(lambda: 1000.0 + (w**2).sum() / 2), 10)
    assert "float64" in said, optimizer.history


# ---------------------------------------------------------------- standing still


def stuck(f: Callable[[Tensor], Tensor], steps: int, **options: Any) -> tuple[Any, list[str]]:
    """Return an upper optimizer whose every step is tiny, and its warnings."""
    x = leaf(3.0, 2.0)
    outer = BiSLS([x], momentum=False, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            x.grad = torch.autograd.grad(f(x), x)[0]
            outer.step(lambda: f(x))
    return outer, [str(w.message) for w in caught if issubclass(w.category, AdaptiveBilevelWarning)]


@pytest.mark.parametrize("start", [0.0, -30.0])
def test_an_upper_variable_without_effect(start: float) -> None:
    """The sigmoid of x weighs the lower loss: from -30 on, f changes by the samples alone."""
    torch.manual_seed(0)
    x, y = leaf(start, start), leaf(0.3, -0.2)
    inner = SLS([y])
    outer = BiSLS([x], lower=inner, direction="adam")

    def step() -> None:
        aim, target = torch.randn(2), 1.0 + 0.3 * torch.randn(2)

        def lower() -> Tensor:
            return ((y - target) ** 2).sum() + (x.sigmoid() * (y - aim) ** 2).sum()

        def upper() -> Tensor:
            return ((y - 1.0) ** 2).sum()

        inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        outer.step(upper)

    assert ("hardly depends on the upper variable" in told(outer, step, 15)) == (start < 0.0)


def test_standing_still_is_said_once() -> None:
    outer, said = stuck(lambda x: (x**2).sum(), 30, max_step=1e-9)
    assert sum("stands still" in text for text in said) == 1
    assert any("stands still" in text for text in diagnose(outer))
    copy = BiSLS([leaf(3.0, 2.0)], momentum=False, max_step=1e-9)
    copy.load_state_dict(outer.state_dict())  # a resumed run does not say it again
    kept: Any = copy.state
    assert kept["diagnosis"]["told"] is True


@pytest.mark.parametrize(
    ("f", "steps"),
    [
        (lambda x: (x**2).sum(), 200),  # to 1e-60 and on
        (lambda x: (x**2).sum() + 1.0, 100),  # to rounding
        (lambda x: ((x - 1) ** 4).sum() + 1e-3, 200),  # flat
    ],
)
def test_a_solution_is_no_standing_still(f: Any, steps: int) -> None:
    assert not any("stands still" in text for text in stuck(f, steps)[1])


def test_a_scheduler_s_warm_up_is_no_standing_still() -> None:
    x = leaf(3.0, 2.0)
    outer = BiSLS([x], momentum=False)
    for group in outer.param_groups:
        group["lr"] = 1e-9
    for _ in range(15):
        x.grad = 2 * x.detach()
        outer.step(lambda: (x**2).sum())
    assert x.max() > 2.9


@pytest.mark.parametrize("wrong", [None, 3, torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)])
def test_what_is_no_optimizer(wrong: Any) -> None:
    with pytest.raises(OptionError, match="diagnose"):
        diagnose(wrong)


def test_what_is_remembered_is_bounded_and_not_saved() -> None:
    w = leaf(3.0, 2.0)
    optimizer = SLS([w])
    for _ in range(70):
        optimizer.step(lambda: (w**2).sum() + 1.0)
    assert len(optimizer.history) == 50 and "history" not in str(optimizer.state_dict())


@pytest.mark.parametrize(("lr", "momentum", "long"), [(0.4, 0.0, False), (0.6, 0.0, True), (0.6, 0.5, False)])
def test_gradient_descent_below_with_too_long_a_step_is_named(lr: float, momentum: float, long: bool) -> None:
    """The largest curvature is 4, so that steps above .5 (1 + momentum) diverge."""
    x, y = leaf(1.0, 0.5), leaf(0.3, -0.2)
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    inner = torch.optim.SGD([y], lr=lr, momentum=momentum)
    outer = BiSLS([x], lower=inner)

    def upper() -> Tensor:
        return ((y - 1) ** 2).sum() + 0.1 * (x**2).sum()

    def lower() -> Tensor:
        return (curvature * y**2).sum() / 2 - (x * y).sum()

    def iterate() -> None:
        inner.zero_grad()
        lower().backward()
        inner.step()
        assign([x], implicit(upper, lower, [x], [y]))
        outer.step(upper, lower)

    text = told(outer, iterate, 5)
    assert ("the lr of SGD, 0.6, was too long in 5 of the last 5 solves" in text) is long
    assert ("an lr below 0.5" in text) is long
