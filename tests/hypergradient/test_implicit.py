"""The implicit hypergradient against golden numbers and differences, and how its result is arranged."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import AdaptiveBilevelWarning, HypergradientError
from adaptive_bilevel.hypergradient import (
    CG,
    Identity,
    Neumann,
    SolverStatus,
    assign,
    implicit,
    implicit_with_info,
    partial_gradients,
)
from tests import problems
from tests.hypergradient.helpers import EXACT, GOLDEN, Drawn, small_model


def test_b2_point_is_the_golden_one():
    problem = problems.b2()
    torch.testing.assert_close(problem.ystar(problem.x0).tolist(), GOLDEN["B2_point"]["ystar"], rtol=1e-12, atol=1e-12)
    assert problem.x0.tolist() == GOLDEN["B2_point"]["x"]
    assert problem.y0.tolist() == GOLDEN["B2_point"]["y0"]


L_B2 = float(torch.linalg.eigvalsh(problems.b2_data().H)[-1])
GOLDEN_SOLVERS: dict[str, Any] = {
    "exact": EXACT,
    "identity": Identity(),
    "cg1": CG(1, 0.0),
    "cg2": CG(2, 0.0),
    "cg3": CG(3, 0.0),
    **{f"neumann_sum{Q}_e0.2": Neumann(Q, 0.2) for Q in (0, 1, 5, 20)},
    **{f"neumann_rand_N3_nbar{n}_e0.2": Drawn(3, 0.2, n) for n in range(3)},
    "identity_scaled_1/L": Identity(0.2),
}


@pytest.mark.parametrize("row", GOLDEN_SOLVERS)
def test_b2_estimators(row):
    at = problems.b2().instance(solved=True)
    (h,) = implicit(at.upper, at.lower, [at.x], [at.y], GOLDEN_SOLVERS[row])
    torch.testing.assert_close(h, problems.vector(GOLDEN["B2_estimators"][row]), rtol=1e-9, atol=1e-9)


def test_b2_away_from_the_solution():
    at = problems.b2().instance()
    (h,) = implicit(at.upper, at.lower, [at.x], [at.y], EXACT)
    torch.testing.assert_close(h, problems.vector(GOLDEN["B2_estimators"]["exact_at_y0"]), rtol=1e-9, atol=1e-9)


def test_b2_random_neumann_in_expectation():
    at = problems.b2().instance(solved=True)
    draws = [implicit(at.upper, at.lower, [at.x], [at.y], Drawn(3, 0.2, n))[0] for n in range(3)]
    mean = torch.stack(draws).mean(0)
    golden = problems.vector(GOLDEN["B2_estimators"]["mean_neumann_rand_N3"])
    torch.testing.assert_close(mean, golden, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, implicit(at.upper, at.lower, [at.x], [at.y], Neumann(2, 0.2))[0])


@pytest.mark.parametrize("build", problems.PROBLEMS, ids=lambda build: build.__name__)
def test_exact_solver_gives_the_gradient_of_F(build):
    problem = build()
    at = problem.instance(solved=True)
    (h,) = implicit(at.upper, at.lower, [at.x], [at.y], EXACT)
    torch.testing.assert_close(h, problem.dF(problem.x0), rtol=1e-9, atol=1e-12)
    difference, e = torch.zeros_like(h), 1e-5
    for j, unit in enumerate(torch.eye(len(h))):
        difference[j] = (problem.F(problem.x0 + e * unit) - problem.F(problem.x0 - e * unit)) / (2 * e)
    torch.testing.assert_close(h, difference, rtol=1e-6, atol=1e-9)


def test_parts_that_do_not_occur_are_zero():
    x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    loss = partial_gradients((x**2).sum(), [x], [y])
    assert loss.upper[0].tolist() == [4.0] and loss.lower[0].tolist() == [0.0]

    def lower():
        return (y**2 - x * y).sum()

    h, info = implicit_with_info(lambda: (x**2).sum(), lower, [x], [y])  # no f_y
    assert h[0].tolist() == [4.0] and info.solution.status is SolverStatus.zero_rhs and info.hvps == 0
    (h,) = implicit(lambda: (y**2).sum(), lower, [x], [y])  # no f_x
    torch.testing.assert_close(h, torch.tensor([3.0]))
    with pytest.warns(AdaptiveBilevelWarning, match="f_x alone"):
        (h,) = implicit(lambda: (y**2 + x**2).sum(), lambda: (y**2).sum(), [x], [y])  # no C
    assert h.tolist() == [4.0]


def test_frozen_and_unused_tensors_contribute_zeros():
    x, y, loss = small_model()
    frozen = torch.randn(2, 2)
    h = implicit(lambda: sum(p.square().sum() for p in y), lambda: loss(x, y), [*x, frozen], [*y, torch.zeros(1)])
    assert [t.shape for t in h] == [t.shape for t in (*x, frozen)]
    assert not h[2].any() and not h[3].any() and h[0].any() and h[1].any()
    plain = implicit(lambda: sum(p.square().sum() for p in y), lambda: loss(x, y), x, y)
    torch.testing.assert_close(h[:3], plain)


def test_counts():
    at = problems.b2().instance()
    _, info = implicit_with_info(at.upper, at.lower, [at.x], [at.y], CG(2, 0.0))
    assert (info.gradients, info.hvps, info.jvps) == (2, 2, 1)
    assert info.upper_loss == at.upper() and info.lower_loss == at.lower()
    torch.testing.assert_close(info.lower_gradient[0], problems.b2().gradient_y(at.x.detach(), at.y.detach()))


# --------------------------------------------------------------------------------------------------------- structures


def test_the_result_is_arranged_like_upper():
    x, y, loss = small_model()

    def h(upper, lower=None):
        return implicit(lambda: sum(p.square().sum() for p in y), lambda: loss(x, y), upper, lower or y)

    expected = h(x)
    assert type(expected) is tuple
    assert type(h(iter(x))) is tuple
    pair = namedtuple("pair", "a b")
    nested = h(OrderedDict(w=x[0], rest=pair([x[1]], x[2])), {"y": y[:2], "z": (y[2],)})
    assert list(nested) == ["w", "rest"] and type(nested["rest"]) is pair
    torch.testing.assert_close((nested["w"], nested["rest"].a[0], nested["rest"].b), expected)
    torch.testing.assert_close(h(x[0]), expected[0])


def test_modules():
    torch.manual_seed(0)
    features, head = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 1)
    data, target = torch.randn(8, 4), torch.randn(8, 1)

    def loss():
        return (head(features(data)) - target).square().mean() + 0.1 * head.weight.square().sum()

    h = implicit(loss, loss, features.parameters(), head.parameters(), CG(50, 1e-10))
    assert [t.shape for t in h] == [p.shape for p in features.parameters()]
    assign(features.parameters(), h)
    for p, part in zip(features.parameters(), h, strict=True):
        assert p.grad is not None and p.grad is not part and torch.equal(p.grad, part)
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("given", [(), (torch.zeros(3),), (torch.zeros(2), torch.zeros(2))])
def test_assign_refuses_what_does_not_fit(given):
    with pytest.raises(HypergradientError, match="shapes"):
        assign([torch.zeros(2, requires_grad=True)], given)


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("solver", [CG(), Neumann(3, 0.1), Identity()], ids=repr)
@pytest.mark.parametrize("bad", ["upper", "lower"])
def test_what_is_not_finite_comes_out_not_finite(solver, bad):
    at = problems.b2().instance()

    def spoil(closure):
        return lambda: closure() * math.nan

    upper, lower = (spoil(at.upper), at.lower) if bad == "upper" else (at.upper, spoil(at.lower))
    (h,) = implicit(upper, lower, [at.x], [at.y], solver)
    assert not h.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    problem = problems.ridge_hpo()
    at = problem.instance(solved=True)
    reference = problem.dF(problem.x0)
    low = problems.ridge_hpo(dtype=dtype)
    x, y = at.x.detach().to(dtype).requires_grad_(), at.y.detach().to(dtype).requires_grad_()
    (h,) = implicit(lambda: low.f(x, y), lambda: low.g(x, y), [x], [y], CG(20, 1e-3))
    assert h.dtype is dtype
    rough = 2e-2 if dtype is torch.float32 else 0.3
    assert (h.double() - reference).norm() <= rough * reference.norm()


def test_a_growing_series_is_said_once_and_kept_out():
    at = problems.b2().instance(solved=True)
    with pytest.warns(AdaptiveBilevelWarning, match="scale"):
        (h,) = implicit(at.upper, at.lower, [at.x], [at.y], Neumann(200, 1.0))
    assert h.isfinite().all() and h.norm() < 1e3
