"""The implicit hypergradient and its products against dense derivatives, golden numbers and edge cases."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import AdaptiveBilevelWarning, ClosureError, HypergradientError, TensorError
from adaptive_bilevel.hypergradient import (
    CG,
    Identity,
    LowerCurvature,
    Neumann,
    SolverStatus,
    assign,
    implicit,
    implicit_with_info,
    partial_gradients,
)
from tests import problems

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
EXACT = CG(100, 1e-13)


def test_b2_point_is_the_golden_one():
    problem = problems.b2()
    torch.testing.assert_close(problem.ystar(problem.x0).tolist(), GOLDEN["B2_point"]["ystar"], rtol=1e-12, atol=1e-12)
    assert problem.x0.tolist() == GOLDEN["B2_point"]["x"]
    assert problem.y0.tolist() == GOLDEN["B2_point"]["y0"]


class Drawn:
    """`Neumann` with the number of factors given instead of drawn."""

    warm_start = False
    resamples = True

    def __init__(self, steps: int, scale: float, factors: int) -> None:
        self.solver, self.factors = Neumann(steps, scale, random=True), factors

    def solve(self, matvec, rhs, initial=None):
        object.__setattr__(self.solver, "_draw", lambda: self.factors)
        return self.solver.solve(matvec, rhs, initial)


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


# ---------------------------------------------------------------------------------------------- products


def small_model():
    """A nonlinear model whose loss mixes three upper tensors with two lower ones, and leaves one of each out."""
    torch.manual_seed(1)
    x = [torch.randn(3, requires_grad=True), torch.randn((), requires_grad=True), torch.randn(2, requires_grad=True)]
    y = [torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(2, requires_grad=True)]
    data, target = torch.randn(5, 3), torch.randn(5, 4)

    def loss(x, y):
        fit = (torch.tanh((data * x[0]) @ y[0] + y[1]) - target).square().mean()
        return fit + x[1].exp() * sum((p**4).sum() for p in y[:2]) + y[2].square().sum()

    return x, y, loss


@pytest.mark.parametrize("moves", [False, True])
def test_products_equal_dense_derivatives(moves: bool):
    x, y, loss = small_model()
    sizes = [t.numel() for t in (*x, *y)]

    def flat(z):
        parts = [p.reshape(t.shape) for p, t in zip(z.split(sizes), (*x, *y), strict=True)]
        return loss(parts[:3], parts[3:])

    z = torch.cat([t.detach().reshape(-1) for t in (*x, *y)])
    dense, dx = torch.func.jacrev(torch.func.grad(flat))(z), sum(sizes[:3])
    H, C = dense[dx:, dx:], dense[:dx, dx:]
    v, d = [torch.randn_like(t) for t in y], [torch.randn_like(t) for t in x]

    def cat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    curvature = LowerCurvature(loss(x, y), x, y, moves=moves)
    close = torch.testing.assert_close
    close(cat(curvature.gradient), torch.func.grad(flat)(z)[dx:])
    for _ in range(2):  # the graph survives its use
        close(cat(curvature.hvp(v)), H @ cat(v))
        close(cat(curvature.cross_vjp(v)), C @ cat(v))
        close(cat(curvature.cross_jvp(d)), C.T @ cat(d))
    assert (curvature.gradients, curvature.hvps, curvature.jvps) == (1 if moves else 2, 2, 4)
    for product, like in ((curvature.hvp(v), y), (curvature.cross_vjp(v), x), (curvature.cross_jvp(d), y)):
        assert [t.shape for t in product] == [t.shape for t in like]
        assert not any(t.requires_grad for t in product)


def test_lower_loss_that_is_linear_has_no_curvature():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for moves in (False, True):
        curvature = LowerCurvature(3 * y.sum() + x.sum(), [x], [y], moves=moves)
        for product in (curvature.hvp([y]), curvature.cross_vjp([y]), curvature.cross_jvp([x])):
            assert torch.equal(product[0], torch.zeros(2))
    _, info = implicit_with_info(lambda: y.sum(), lambda: y.sum(), [x], [y])
    assert info.solution.status is SolverStatus.negative_curvature


def test_memory_goes_with_the_object():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            kept = t.detach() * 1.0
            ctx.save_for_backward(t)
            ctx.kept = kept
            probes.append(weakref.ref(kept))
            return kept.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    probes: list = []
    gc.disable()  # reference counts have to do it
    try:
        implicit(lambda: y.sum(), lambda: (Probe.apply(x * y) ** 2).sum(), [x], [y])
        assert probes and all(probe() is None for probe in probes)
    finally:
        gc.enable()


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


# ---------------------------------------------------------------------------------------------- structures


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


# ---------------------------------------------------------------------------------------------- warm start


def testlast_solution_in_a_loop():
    problem = problems.random_qb(0, mu=0.01, dy=20)
    at = problem.instance()
    counts = {False: 0, True: 0}
    for warm in counts:
        for k in range(5):
            with torch.no_grad():
                at.x.copy_(problem.x0 + 1e-4 * k)
            solver = CG(50, 1e-3, warm_start=warm)  # a new object each time: the state is not in it
            _, info = implicit_with_info(at.upper, at.lower, [at.x], [at.y], solver)
            counts[warm] += info.hvps
            assert info.solution.residual <= 1e-3
    assert counts[True] < 0.6 * counts[False]


def testlast_solution_dies_with_the_lower_tensors():
    from adaptive_bilevel.hypergradient import last_solution

    at = problems.b2().instance()
    implicit(at.upper, at.lower, [at.x], [at.y], CG(warm_start=True))
    before = len(last_solution._solutions)
    assert last_solution.recall([at.y]) is not None
    assert last_solution.recall([at.y, at.x]) is None  # does not fit
    del at
    gc.collect()
    assert len(last_solution._solutions) == before - 1


def test_a_given_start_resumes_bitwise():
    at = problems.b2().instance()
    solver = CG(2, 0.0, warm_start=True)
    _, first = implicit_with_info(at.upper, at.lower, [at.x], [at.y], solver)
    (second,) = implicit(at.upper, at.lower, [at.x], [at.y], solver)
    other = problems.b2().instance()
    (resumed,) = implicit(other.upper, other.lower, [other.x], [other.y], solver, initial=first.solution.tensors)
    assert torch.equal(second, resumed)


# ---------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_left_behind(backward):
    at = problems.b2().instance()
    at.x.grad, kept = torch.full_like(at.x, 7.0), torch.full_like(at.x, 7.0)
    held = at.x.grad
    values, state = (at.x.detach().clone(), at.y.detach().clone()), torch.get_rng_state()

    def with_backward(closure):
        def call():
            for t in (at.x, at.y):
                t.grad = None
            loss = closure()
            loss.backward()
            return loss

        return call if backward else closure

    h = implicit(with_backward(at.upper), with_backward(at.lower), [at.x], [at.y], EXACT)
    assert at.x.grad is held and torch.equal(held, kept) and at.y.grad is None
    assert torch.equal(at.x, values[0]) and torch.equal(at.y, values[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not h[0].requires_grad
    torch.testing.assert_close(h[0], problems.b2().hypergradient(*values))


def test_each_closure_is_called_once():
    calls = {"upper": 0, "lower": 0}
    at = problems.b2().instance()

    def counted(name, closure):
        def call():
            calls[name] += 1
            return closure()

        return call

    upper, lower = counted("upper", at.upper), counted("lower", at.lower)
    for solver in (EXACT, Neumann(4, 0.2), Identity()):
        implicit(upper, lower, [at.x], [at.y], solver)
    assert calls == {"upper": 3, "lower": 3}
    implicit(upper, lower, [at.x], [at.y], Drawn(5, 0.2, 4))
    assert calls == {"upper": 4, "lower": 8}  # four factors and C


def test_random_neumann_takes_independent_samples():
    """With one-sample Hessians h_i, the product of factors is (1 - e h_1)(1 - e h_2), not a power of one of them."""
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    batches = iter([1.0, 3.0, 2.0])

    def lower():
        h = next(batches)
        return (0.5 * h * y**2 - h * x * y).sum()

    (h,) = implicit(lambda: y.sum(), lower, [x], [y], Drawn(3, 0.1, 2))
    v = 3 * 0.1 * (1 - 0.1 * 1.0) * (1 - 0.1 * 3.0)
    torch.testing.assert_close(h, torch.tensor([2.0 * v]))


def test_batch_norm_and_dropout_see_one_evaluation():
    torch.manual_seed(0)
    first, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    net = nn.Sequential(first, norm, nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.zeros((), requires_grad=True)
    data = torch.randn(16, 3)

    def lower():
        return net(data).square().mean() + x.exp() * sum(p.square().sum() for p in net.parameters())

    implicit(lambda: first.weight.sum(), lower, [x], net.parameters())
    assert norm.num_batches_tracked == 1


def test_an_exception_leaves_everything_as_it_was():
    at = problems.b2().instance()
    at.x.grad = held = torch.ones_like(at.x)
    state = torch.get_rng_state()

    def broken():
        torch.rand(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        implicit(at.upper, broken, [at.x], [at.y])
    assert at.x.grad is held and torch.equal(state, torch.get_rng_state())


def test_works_under_no_grad():
    at = problems.b2().instance()
    with torch.no_grad():
        (h,) = implicit(at.upper, at.lower, [at.x], [at.y], EXACT)
    torch.testing.assert_close(h, problems.b2().hypergradient(at.x.detach(), at.y.detach()))


# ---------------------------------------------------------------------------------------------- numbers


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


# ---------------------------------------------------------------------------------------------- wrong use

X, Y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


def good():
    return (X * Y).sum() + Y.square().sum()


@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (None, "not callable"),
        (lambda: 1.0, "1.0"),
        (lambda: None, "None"),
        (lambda: X * Y, r"shape \(2,\)"),
        (lambda: good().detach(), "without"),
        (lambda: torch.ones(3, requires_grad=True).sum(), "depends on no tensor"),
    ],
)
@pytest.mark.parametrize("which", ["upper_closure", "lower_closure"])
def test_wrong_closures(closure, words, which):
    closures = {"upper_closure": good, "lower_closure": good, which: closure}
    with pytest.raises(ClosureError, match=words) as caught:
        implicit(**closures, upper=[X], lower=[Y])
    assert which in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_loss_that_was_differentiated_inside():
    def closure():
        loss = (X * Y).square().sum()
        torch.autograd.grad(loss, [Y])
        return loss

    with pytest.raises(ClosureError, match="freed the graph"):
        implicit(good, closure, [X], [Y])


@pytest.mark.parametrize(
    ("upper", "lower", "words"),
    [
        ([], [Y], r"upper=\[\]"),
        ([X], [], r"lower=\[\]"),
        ([X], [X], r"lower\[0\] is the same tensor as upper\[0\]"),
        ([X, X], [Y], r"upper\[1\] is the same tensor as upper\[0\]"),
        ([torch.ones(2)], [Y], "No tensor of upper requires a gradient"),
        ([X], [torch.ones(2)], "No tensor of lower requires a gradient"),
        ([X, torch.ones(2).to_sparse()], [Y], r"upper\[1\] has layout torch.sparse_coo"),
        ([X], [torch.ones(2, dtype=torch.complex128, requires_grad=True)], r"lower\[0\] has dtype torch.complex128"),
        ([X, torch.ones(2, dtype=torch.int64)], [Y], r"upper\[1\] has dtype torch.int64"),
        ([X, "weight"], [Y], "upper must hold tensors only, got str"),
        (3, [Y], "upper must hold tensors only, got int"),
    ],
)
def test_wrong_tensors(upper, lower, words):
    with pytest.raises(TensorError, match=words):
        implicit(good, good, upper, lower)
