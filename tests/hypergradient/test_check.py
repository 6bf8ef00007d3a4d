"""`hypergradient.check` on gradients that are wrong in a known way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import ClosureError, HypergradientError, OptionError, TensorError
from adaptive_bilevel.hypergradient import CG, Verdict, check, implicit
from tests import problems

EXACT = CG(200, 1e-12)


def parts(problem, x, y):
    """f_x and C v with dense matrices, so that the check is not compared with itself."""
    fx, fy = torch.func.grad(problem.f, argnums=(0, 1))(x, y)
    return fx, problem.cross(x, y) @ torch.linalg.solve(problem.hessian(x, y), fy)


def with_penalty(problem):
    """The problem with .3 |x - 1|^2 added to f, so that there is a direct part."""

    def f(x, y):
        return problem.f(x, y) + 0.3 * (x - 1).square().mean()

    return problems.Problem(problem.name + "+direct", f, problem.g, problem.x0, problem.y0, problem.solve)


PROBLEMS = {
    "b2": problems.b2,
    "ridge": lambda: with_penalty(problems.ridge_hpo()),
    "ridge without f_x": problems.ridge_hpo,
    "softmax": lambda: with_penalty(problems.softmax_toy()),
}

# name: gradient from (f_x, C v), verdict, words in the sentence, cosine and scale to expect (None: anything)
FAULTS = {
    "right": (lambda fx, cv: fx - cv, Verdict.right, "right", 1.0, 1.0),
    "plus sign": (lambda fx, cv: fx + cv, Verdict.implicit_sign, "implicit term has the wrong sign", None, None),
    "uphill": (lambda fx, cv: cv - fx, Verdict.sign, "sign is flipped", -1.0, 1.0),
    "five times": (lambda fx, cv: 5 * (fx - cv), Verdict.scale, "factor of about 5", 1.0, 5.0),
    "a tenth": (lambda fx, cv: 0.1 * (fx - cv), Verdict.scale, "factor of about 0.1", 1.0, 0.1),
    "minus five": (
        lambda fx, cv: -5 * (fx - cv),
        Verdict.sign,
        "and the scale is off by a factor of about 5",
        -1.0,
        5.0,
    ),
    "direct part": (lambda fx, cv: fx, Verdict.direct_only, "direct part f_x only", None, None),
    "implicit term doubled": (
        lambda fx, cv: fx - 2 * cv,
        Verdict.implicit_scale,
        "off by a factor of about 2",
        None,
        None,
    ),
    "other direction": (lambda fx, cv: (fx - cv).flip(0), Verdict.direction, "direction is wrong", None, 1.0),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(name, fault):
    problem = PROBLEMS[name]()
    at = problem.instance(solved=True)
    fx, cv = parts(problem, at.x.detach(), at.y.detach())
    make, verdict, words, cosine, scale = FAULTS[fault]
    if not fx.any():  # then the implicit term is all there is
        verdict, words = {
            "plus sign": (Verdict.sign, "sign is flipped"),
            "implicit term doubled": (Verdict.scale, "factor of about 2"),
            "direct part": (Verdict.direct_only, "which is zero"),
        }.get(fault, (verdict, words))
    at.x.grad = make(fx, cv)
    report = check(at.upper, at.lower, [at.x], [at.y])
    assert report.verdict is verdict, str(report)
    assert words in report.sentence
    assert report.ok == bool(report) == (fault == "right")
    if cosine is not None:
        assert report.cosine == pytest.approx(cosine, abs=1e-5)
        assert report.sign == math.copysign(1, cosine)
    if scale is not None:
        assert report.scale == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_measurement_is_the_gradient_of_F(name):
    problem = PROBLEMS[name]()
    at = problem.instance(solved=True)
    report = check(at.upper, at.lower, [at.x], [at.y], gradient=[problem.dF(problem.x0)])
    assert report.relative_error < 1e-7
    assert report.lower_distance < 1e-9
    if len(problem.x0) <= 6:
        measured = torch.tensor([d.measured for d in report.directions])
        torch.testing.assert_close(measured, problem.dF(problem.x0), rtol=1e-6, atol=1e-9)
        assert report.directions[0].name == "coordinate 0"
    else:
        assert [d.name for d in report.directions][:1] == ["gradient"]
        assert any(d.name.startswith("random") for d in report.directions)


def test_a_scalar_upper_variable():
    problem = problems.b1()
    at = problem.instance(solved=True)
    fx, cv = parts(problem, at.x.detach(), at.y.detach())
    expected = {
        Verdict.right: fx - cv,
        Verdict.direct_only: fx,
        Verdict.implicit_sign: fx + cv,
        Verdict.sign: cv - fx,
        Verdict.scale: 3 * (fx - cv),
    }
    for verdict, gradient in expected.items():
        assert check(at.upper, at.lower, [at.x], [at.y], gradient=[gradient]).verdict is verdict


def test_a_small_implicit_term_is_no_excuse_for_its_sign():
    problem = problems.b2()

    def f(x, y):
        return 0.01 * problem.f(x, y) + x.sum()

    scaled = problems.Problem("scaled", f, problem.g, problem.x0, problem.y0, problem.solve)
    at = scaled.instance(solved=True)
    fx, cv = parts(scaled, at.x.detach(), at.y.detach())
    for sign, verdict in ((-1, Verdict.right), (1, Verdict.implicit_sign), (0, Verdict.direct_only)):
        report = check(at.upper, at.lower, [at.x], [at.y], gradient=[fx + sign * cv], tolerance=0.9)
        assert report.verdict is verdict, str(report)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_lower_problem_that_was_not_solved(name):
    problem = PROBLEMS[name]()
    at = problem.instance()
    gradient = implicit(at.upper, at.lower, [at.x], [at.y], EXACT)
    report = check(at.upper, at.lower, [at.x], [at.y], gradient=gradient)
    assert report.verdict is Verdict.lower_unsolved, str(report)
    assert "not solved" in report.sentence
    assert report.lower_gradient == pytest.approx(float(problem.gradient_y(problem.x0, problem.y0).norm()))
    ystar = problem.ystar(problem.x0)
    assert report.lower_distance == pytest.approx(float((problem.y0 - ystar).norm() / ystar.norm()), rel=1e-6)


def test_an_approximate_hypergradient_passes():
    problem = problems.random_qb(3)
    at = problem.instance(solved=True)
    assert check(
        at.upper, at.lower, [at.x], [at.y], gradient=implicit(at.upper, at.lower, [at.x], [at.y], CG(20, 1e-2))
    )


def test_float32():
    problem = problems.ridge_hpo(dtype=torch.float32)
    at = problem.instance(solved=True)
    gradient = problem.dF(problem.x0)
    assert check(at.upper, at.lower, [at.x], [at.y], gradient=[gradient]).ok
    assert check(at.upper, at.lower, [at.x], [at.y], gradient=[3 * gradient]).verdict is Verdict.scale
    assert check(at.upper, at.lower, [at.x], [at.y], gradient=[-gradient]).verdict is Verdict.sign


def test_closures_that_draw_a_new_batch_or_mask():
    at = problems.b2().instance(solved=True)
    at.x.grad = problems.b2().dF(at.x.detach())
    for upper, lower in (
        (lambda: at.upper() * (1 + 0.1 * torch.rand(())), at.lower),
        (at.upper, lambda: at.lower() + torch.rand(()) * at.y.sum()),
    ):
        report = check(upper, lower, [at.x], [at.y])
        assert report.verdict is Verdict.noisy and not report.ok
        assert "not deterministic" in report.sentence and report.directions == ()


def test_what_is_not_finite():
    at = problems.b2().instance(solved=True)
    report = check(at.upper, at.lower, [at.x], [at.y], gradient=[torch.tensor([1.0, math.nan])])
    assert report.verdict is Verdict.non_finite and not report
    report = check(lambda: at.upper() * math.nan, at.lower, [at.x], [at.y], gradient=[torch.ones(2)])
    assert report.verdict is Verdict.non_finite


def test_a_lower_loss_without_minimum_is_inconclusive():
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    report = check(lambda: (y**2).sum(), lambda: (x * y).sum() - (y**4).sum(), [x], [y], gradient=[torch.ones(1)])
    assert report.verdict is Verdict.inconclusive
    assert y.item() == 1.0


def test_a_nonquadratic_lower_problem_is_solved_from_far():
    x, y = torch.tensor([0.3], requires_grad=True), torch.tensor([6.0, -4.0], requires_grad=True)

    def lower():  # y* = (x, x): minimizer of log cosh; Newton alone would leave
        return torch.log(torch.cosh(y - x)).sum() + 0.01 * (y - x).square().sum()

    assert check(lambda: y.sum() + (x**2).sum(), lower, [x], [y], gradient=[2 * x.detach() + 2]).ok


def test_modules_and_frozen_tensors():
    torch.manual_seed(0)
    first, head = nn.Linear(4, 3), nn.Linear(3, 1)
    features = nn.Sequential(first, nn.Tanh())
    first.bias.requires_grad_(False)
    data, target, held_out, truth = torch.randn(12, 4), torch.randn(12, 1), torch.randn(9, 4), torch.randn(9, 1)

    def upper():
        return (head(features(held_out)) - truth).square().mean()

    def lower():
        ridge = head.weight.square().sum() + head.bias.square().sum()
        return (head(features(data)) - target).square().mean() + 0.1 * ridge

    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = lower()
        loss.backward()
        return loss

    optimizer.step(closure)
    h = implicit(upper, lower, features.parameters(), head.parameters(), EXACT)
    for p, part in zip(features.parameters(), h, strict=True):
        p.grad = part if p.requires_grad else None
    report = check(upper, lower, features.parameters(), head.parameters())
    assert report.ok and report.relative_error < 1e-6, str(report)
    next(features.parameters()).grad = -h[0]
    assert check(upper, lower, features.parameters(), head.parameters()).verdict is Verdict.sign


@pytest.mark.parametrize("fails_at", [None, 1, 7, 20])
def test_nothing_is_left_behind(fails_at):
    torch.manual_seed(0)
    first = nn.Linear(2, 4)
    net = nn.Sequential(first, nn.BatchNorm1d(4), nn.Linear(4, 1))
    x, data = torch.zeros(2, requires_grad=True), torch.randn(16, 2)
    x.grad = torch.ones(2)
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    torch.randn(3)
    tensors = [x, *net.parameters()]
    everything = [*tensors, *net.buffers(), *(p.grad for p in tensors if p.grad is not None)]
    before, identities = [t.detach().clone() for t in everything], [id(p.grad) for p in tensors]
    state, calls = torch.get_rng_state(), 0

    def lower():
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == fails_at:
            raise KeyboardInterrupt
        return net(data * x.exp()).square().mean() + sum(p.square().sum() for p in net.parameters())

    def upper():
        return first.weight.sum() + x.sum()

    if fails_at is None:
        check(upper, lower, [x], net.parameters())
        assert calls > 20
    else:
        with pytest.raises(KeyboardInterrupt):
            check(upper, lower, [x], net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))
    assert identities == [id(p.grad) for p in tensors]
    assert torch.equal(state, torch.get_rng_state())


def test_the_report_prints_its_directions():
    at = problems.b1().instance(solved=True)
    text = str(check(at.upper, at.lower, [at.x], [at.y], gradient=[torch.tensor([4.5])]))
    assert text.splitlines()[0] == "The direction is right, but the scale is off by a factor of about 5."
    assert "coordinate 0" in text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"directions": 0}, OptionError, "directions=0"),
        ({"tolerance": 1.5}, OptionError, "tolerance=1.5"),
        ({"step": 0.0}, OptionError, "step=0.0"),
        ({"max_iterations": 0}, OptionError, "max_iterations=0"),
        ({"seed": 0.5}, OptionError, "seed=0.5"),
        ({"gradient": None}, HypergradientError, "Every .grad of upper is None"),
        ({"gradient": [torch.ones(3)]}, HypergradientError, "shapes"),
        ({"lower_closure": None}, ClosureError, "lower_closure=None"),
        ({"upper_closure": lambda: torch.ones(2)}, ClosureError, "upper_closure|shape"),
        ({"upper": []}, TensorError, "upper="),
    ],
)
def test_wrong_use(change, error, words):
    at = problems.b2().instance(solved=True)
    given = {"upper_closure": at.upper, "lower_closure": at.lower, "upper": [at.x], "lower": [at.y]}
    with pytest.raises(error, match=words):
        check(**{**given, "gradient": [torch.ones(2)], **change})


def test_tensors_that_cannot_be_moved():
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = 2 * w
    with pytest.raises(TensorError, match="no leaf"):
        check(lambda: y.sum(), lambda: (y * x).sum(), [x], [y], gradient=[x.detach()])
