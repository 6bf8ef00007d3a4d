"""x in no loss: mostly a copy of it is. The hypergradient is not zero but unknown, and that is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import (
    CG,
    Amortised,
    Averaged,
    Identity,
    Implicit,
    Lanczos,
    LowerCurvature,
    Neumann,
    Oracle,
    Point,
    Sample,
    Unroll,
    UnrollForward,
    ValueFunction,
    Verdict,
    check,
    descend,
    implicit,
)

COPIES: dict[str, Any] = {
    "detach": lambda x: x.detach(),
    "clone().data": lambda x: x.clone().data,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "item": lambda x: torch.tensor([v.item() for v in x], dtype=x.dtype),
}


def problem(copy: Any) -> tuple[Tensor, Tensor, Any, Any]:
    x = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    y = torch.tensor([0.5, 1.5, -1.0], requires_grad=True)
    return x, y, lambda: ((y - 1) ** 2 + copy(x).exp() * y**2).sum(), lambda: ((y - 2) ** 2).sum()


@pytest.mark.parametrize("solver", [Lanczos(), CG(), Neumann(steps=2, scale=0.1), Identity(0.1)], ids=repr)
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_x_is_said(copy: str, solver: Any) -> None:
    x, y, lower, upper = problem(COPIES[copy])
    with pytest.warns(AdaptiveBilevelWarning, match="does not depend on x.*zero.*copy"):
        (h,) = implicit(upper, lower, [x], [y], solver)
    assert not h.any()
    with pytest.warns(AdaptiveBilevelWarning, match=r"does not depend on x.*f_x alone"):
        (h,) = implicit(lambda: upper() + (x**2).sum(), lower, [x], [y], solver)
    torch.testing.assert_close(h, 2 * x.detach())


def test_a_path_whose_product_is_zero_is_none() -> None:
    """Zero by value is no lost path: nothing is said."""
    x, y, lower, upper = problem(lambda x: 0.0 * x)
    assert not implicit(upper, lower, [x], [y])[0].any()


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("claimed", [0.0, 1.0])
def test_check_never_calls_it_right(copy: str, claimed: float) -> None:
    x, y, lower, upper = problem(COPIES[copy])
    report = check(upper, lower, [x], [y], gradient=[torch.full((3,), claimed)])
    assert report.verdict is Verdict.unconnected and not report and "does not depend on x" in report.sentence


ESTIMATORS = [Implicit(), Implicit(CG()), Amortised(), Averaged(), Unroll(), UnrollForward(), ValueFunction()]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("connected", [False, True])
def test_every_estimator_says_it_once(estimator: Any, connected: bool, recwarn: pytest.WarningsRecorder) -> None:
    def lower(x: Any, y: Any, batch: Any) -> Tensor:
        weight = x[0] if connected else x[0].detach()
        return ((y[0] - 1) ** 2 + weight.exp() * y[0] ** 2).sum()

    oracle = Oracle(lambda x, y, _: ((y[0] - 2) ** 2).sum(), lower)
    x, sample = (torch.tensor([0.3, -0.2]),), Sample()
    y, path = descend(oracle, x, (torch.tensor([0.0, 0.0]),), 3, 0.1, sample)
    point = Point(x, y, v=(torch.ones(2),), z=(torch.zeros(2),), multiplier=2.0, path=path)
    warnings.simplefilter("always")
    for _ in range(3):
        h = estimator(oracle, point, sample).hypergradient
    assert bool(h[0].any()) == connected
    said = [str(w.message) for w in recwarn if "does not depend on x" in str(w.message)]
    assert len(said) == (0 if connected else 1)


def test_mixed_is_known_after_a_product() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for loss, mixed in (((x * y**2).sum(), True), ((x**2 + y**2).sum(), False)):
        curvature = LowerCurvature(loss, [x], [y], moves=True)
        assert curvature.mixed
        for product in (curvature.cross_vjp, curvature.cross_jvp):
            product([torch.ones(2)])
            assert curvature.mixed == mixed
        curvature.pull_back([torch.ones(2)])
        assert curvature.mixed == mixed
