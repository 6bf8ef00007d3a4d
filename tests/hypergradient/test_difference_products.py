"""Products by differences of gradients, for losses that have no second derivatives."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning, OptionError, SolverError
from adaptive_bilevel.evaluation.guard import Guard, Workspace
from adaptive_bilevel.hypergradient import CG, Implicit, Lanczos, Neumann, assign, implicit, implicit_with_info
from adaptive_bilevel.hypergradient.curvature import LowerCurvature
from adaptive_bilevel.hypergradient.difference_lengths import Known, Measured, Trials
from adaptive_bilevel.hypergradient.difference_products import DifferenceCurvature, LowerLoss
from tests.hypergradient.test_second_derivatives import attention, heard, problem


class Attention(nn.Module):
    """Two tokens attend to each other; the loss of each sample has a weight, which is the upper variable."""

    def __init__(self, wrap: Callable[[Any], Any] = lambda f: f) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 1)
        self.attend = wrap(self._attend)

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.attend(self.embed(tokens)).mean(1)).squeeze(1)


class Reweighting:
    """Sample weights x above an attention model y with weight decay."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        draws = torch.Generator().manual_seed(3)
        self.tokens = torch.randn(16, 4, 3, generator=draws, dtype=torch.float64).to(dtype)
        self.target = self.tokens.sum((1, 2)).sin() + (torch.arange(16) % 2)  # every second one is spoilt
        self.model = model.to(dtype)
        self.x = [torch.zeros(16, dtype=dtype, requires_grad=True)]
        self.y = list(model.parameters())

    def losses(self) -> Tensor:
        return (self.model(self.tokens) - self.target).square()

    def lower(self) -> Tensor:
        return (self.x[0].sigmoid() * self.losses()).mean() + 0.05 * sum(p.square().sum() for p in self.y)

    def upper(self) -> Tensor:
        return (self.model(self.tokens) - self.tokens.sum((1, 2)).sin()).square().mean()


def model_of(wrap: Callable[[Any], Any] = lambda f: f) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(wrap)


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="aot_eager")


def reentrant(function: Any) -> Any:
    return lambda h: checkpoint(function, h, use_reentrant=True)


class OnceDifferentiable(torch.autograd.Function):
    """A function of one tensor whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, function: Any, h: Tensor, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.inputs = [h.detach().requires_grad_(), *parameters]
            ctx.out = function(ctx.inputs[0])
        found: Tensor = ctx.out.detach()
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *torch.autograd.grad(ctx.out, ctx.inputs, gradient, retain_graph=True)


def once(function: Any) -> Any:
    return lambda h: OnceDifferentiable.apply(function, h, *function.__self__.qkv.parameters())


WITHOUT = {"attention": lambda f: f, "compiled": compiled, "reentrant": reentrant, "once": once}


def error_of(found: Any, exact: Any) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in exact))


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("products", ["auto", "difference"])
def test_right_in_float32(name: str, products: str) -> None:
    """Against double precision with math kernels; x, y, random state and buffers are as after any evaluation."""
    reference = Reweighting(model_of(), torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        exact = implicit(reference.upper, reference.lower, reference.x, reference.y)
    task = Reweighting(model_of(WITHOUT[name]))
    before, graph = [t.detach().clone() for t in (*task.x, *task.y)], (task.y[0] * 2).sum()
    found: list[Any] = []

    def run() -> None:
        found[:] = implicit_with_info(task.upper, task.lower, task.x, task.y, products=products)

    said = heard(run)
    assert sum("by differences of gradients from now on" in text for text in said) == (products == "auto")
    assert not heard(run)
    h, info = found
    assert error_of(h, exact) < 1e-3
    assert info.error < 1e-2 and info.hvps == info.jvps == 0 and info.gradients >= 2 * info.solution.iterations
    assert all(torch.equal(a, b) for a, b in zip(before, (*task.x, *task.y), strict=True))
    assert all(t.grad is None for t in (*task.x, *task.y))
    graph.backward()  # no tensor has a new version


def test_products_of_all_kinds() -> None:
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.3, -0.2], [0.7, 0.1, -0.4]))

    def lower() -> Tensor:
        return (x.exp().sum() * y.sin()).sum() + (y**4).sum() + x[0] * y[1] ** 2

    exact = LowerCurvature(lower(), [x], [y])
    with Guard([x, y], Workspace()) as guard:
        curvature = DifferenceCurvature(LowerLoss(guard, [(lower, guard.entry)]), [x], [y])
        v, d = [torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)], [torch.tensor([0.2, 3.0], dtype=torch.float64)]
        pairs = [
            (curvature.gradient, exact.gradient),
            (curvature.hvp(v), exact.hvp(v)),
            (curvature.cross_vjp(v), exact.cross_vjp(v)),
            (curvature.cross_jvp(d), exact.cross_jvp(d)),
            (curvature.push_forward(d, v), exact.push_forward(d, v)),
            *zip(curvature.pull_back(v), exact.pull_back(v), strict=True),
        ]
        zero = curvature.hvp([torch.zeros_like(v[0])])
        bad = curvature.hvp([v[0] * math.nan])
    for found, wanted in pairs:
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert not zero[0].any() and bad[0].isnan().all()
    assert curvature.error < 1e-6


@pytest.mark.parametrize("solver", [Lanczos(), CG(), Neumann(3, 0.1), Neumann(3, 0.1, random=True)], ids=repr)
def test_every_solver(solver: Any) -> None:
    """As with autograd, counts of a product being two gradients, and random numbers drawn alike."""

    def run(products: str) -> tuple[Tensor, Any, float, Any]:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4).double()
        x, y, lower, upper = problem(torch.sin)

        def noisy() -> Tensor:
            mask = torch.nn.functional.dropout(torch.ones(4, dtype=torch.float64), 0.3)
            return lower() + 4.0 * (y**2).sum() + (norm(torch.outer(mask, y)) ** 2).mean()

        (h,), info = implicit_with_info(upper, noisy, [x], [y], solver, products=products)
        return h, info, float(torch.rand(1)), norm.state_dict()

    h, info, drawn, buffers = run("difference")
    exact, known, same, before = run("autograd")
    torch.testing.assert_close(h, exact, rtol=1e-5, atol=1e-6)
    assert drawn == same and str(buffers) == str(before)
    assert info.solution.iterations == known.solution.iterations
    assert info.gradients >= known.gradients + 2 * (known.hvps + known.jvps)
    assert math.isnan(known.error) and info.error < 1e-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile, outside of steps
@pytest.mark.parametrize("name", WITHOUT)
def test_bisls_trains_a_model_without_second_derivatives(name: str) -> None:
    """As well as by autograd, at most 1.15 times its cost. Every second sample is spoilt: its weight shall fall.

    By autograd, a step takes over the graph of the hypergradient; differences have none.
    """

    def run(products: str) -> tuple[float, float, Tensor, Any]:
        task = Reweighting(model_of(WITHOUT[name] if products == "difference" else WITHOUT["attention"]))
        inner = SLS(task.y)
        outer, cost = BiSLS(task.x, lower=inner, direction="adam", products=products), 0.0
        for _ in range(6):
            for _ in range(3):
                inner.step(task.lower)
            h, info = implicit_with_info(task.upper, task.lower, task.x, task.y, products=products)
            cost += info.gradients + 2.2 * info.hvps + info.jvps
            assign(task.x, h)
            outer.step(task.upper)
        weights = task.x[0].detach()
        return float(task.upper().detach()), cost + outer.evaluations.lower.cost, weights, outer.hessian

    loss, cost, weights, hessian = run("difference")
    with sdpa_kernel(SDPBackend.MATH):
        reference, known, *_ = run("autograd")
    assert loss < 1.05 * reference
    assert cost < 1.15 * known
    assert weights[::2].mean() > weights[1::2].mean()
    assert hessian.error < 1e-2


def test_a_product_that_is_rounding_spoils_no_later_one() -> None:
    """C v is zero here, so its differences are rounding; a shorter one that is zero to the bit is no better one."""
    x = [torch.tensor([0.5]).float().requires_grad_()]
    at, direction = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)).float() + 1
    y, v = [at.clone().requires_grad_()], [direction]

    def lower() -> Tensor:
        return x[0].sum() * (y[0] - at).square().sum() + y[0].square().sum()

    with Guard([*x, *y], Workspace()) as guard:
        for _ in range(3):
            products = DifferenceCurvature(LowerLoss(guard, [(lower, guard.random_state())]), x, y)
            products.cross_vjp(v)
            torch.testing.assert_close(products.hvp(v), (3 * v[0],), rtol=1e-3, atol=0.0)


def test_kinds_of_products_have_lengths_of_their_own() -> None:
    """H v asks for a short one, as the curvature varies; C v for a long one, as the gradient by x is large and flat."""
    x, y = [torch.ones(50).float().requires_grad_()], [torch.linspace(-1.0, 1.0, 50).float().requires_grad_()]
    v = [torch.linspace(1.0, 2.0, 50).float()]

    def lower() -> Tensor:
        return (x[0] * (100.0 + 1e-2 * y[0])).sum() + 1e-3 * (30.0 * y[0]).sin().sum()

    with Guard([*x, *y], Workspace()) as guard:
        for _ in range(3):
            products = DifferenceCurvature(LowerLoss(guard, [(lower, guard.random_state())]), x, y)
            exact = -0.9 * (30.0 * y[0].detach().double()).sin() * v[0].double()
            assert error_of(products.hvp(v), [exact]) < 2e-3
            assert error_of(products.cross_vjp(v), [1e-2 * v[0].double()]) < 5e-2


@pytest.mark.parametrize("rounding", [1e-7, 1e-5], ids=["as precision says", "of a sum that cancels"])
@pytest.mark.parametrize("start", [1e-5, 1e-1], ids=["too short", "too long"])
def test_lengths_come_to_the_best_one(start: float, rounding: float) -> None:
    """With changes h e and k e^2 of a gradient whose rounding is known, for 2.2 gradients a product."""
    h, k, eps = 0.3, 4.0, 1e-7
    noise = torch.Generator().manual_seed(0)

    def measured(length: float) -> Measured:
        drawn = rounding * float(0.7 + 0.6 * torch.rand((), generator=noise))
        return Measured(length, 2.0 * h * length, math.hypot(k * length**2, drawn), eps)

    known, count = Known(start), 0
    for _ in range(100):
        trials = Trials(known, eps ** (1.0 / 3.0), 10.0)
        while not trials.ended:
            trials.add(measured(trials.length))
            count += 1
        count += trials.due is not None
        known = trials.known() if trials.due is None else trials.known(measured(trials.due), 1e-3)
    best = (rounding * h / (math.sqrt(3.0) * k**2)) ** (1.0 / 3.0)
    assert best / 2.5 < known.length < 2.5 * best
    assert count < 110


def test_what_float32_cannot_resolve_is_said() -> None:
    x, y = torch.ones(1).float().requires_grad_(), torch.linspace(-1.0, 2.0, 50).float().requires_grad_()

    def steep() -> Tensor:  # its gradient of 1e5 hides the change of that of the curvature, which varies
        return (1e5 * y + 0.01 * (10.0 * y).cos() * x).sum()

    def run() -> Any:
        return implicit_with_info(lambda: y.exp().sum(), steep, [x], [y], Lanczos(2), products="difference")

    found: list[Any] = []
    said = heard(lambda: found.extend(run()))
    assert found[1].error > 0.1
    assert sum("are wrong by" in text and "close to rounding" in text for text in said) == 1
    assert not any("are wrong by" in text for text in heard(run))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, dtype=dtype, requires_grad=True)
    with pytest.raises(SolverError, match="too few digits"):
        implicit(lambda: y.sum(), lambda: (y.float() ** 2 - x * y).sum(), [x], [y], products="difference")


def test_what_is_no_leaf_is_refused() -> None:
    x, y, lower, upper = problem(attention)
    z = y.expm1()
    with Guard([x, y], Workspace()) as guard, pytest.raises(SolverError, match="no leaf"):
        DifferenceCurvature(LowerLoss(guard, [(lower, guard.entry)]), [x], [z])
    with pytest.raises(OptionError, match="products"):
        implicit(upper, lower, [x], [y], products="exact")
    with pytest.raises(OptionError, match="products"):
        BiSLS([x], lower=SLS([y]), products="exact")


def test_warnings_are_of_the_package() -> None:
    x, y, lower, upper = problem(attention)
    with pytest.warns(AdaptiveBilevelWarning, match="cannot be differentiated twice"):
        implicit(upper, lower, [x], [y])


@pytest.mark.filterwarnings("ignore:lower_closure")  # "auto" says what it does
@pytest.mark.parametrize("products", ["auto", "difference"])
def test_a_resumed_run_is_the_same_to_the_bit(products: str) -> None:
    """The lengths are saved with the optimizer's state: those of the hypergradient, too."""

    def run(steps: int, saved: Any = None) -> tuple[list[Tensor], Any]:
        task = Reweighting(model_of())
        inner = SLS(task.y)
        outer = BiSLS(task.x, lower=inner, direction="adam", products=products)
        if saved is not None:
            for p, value in zip((*task.x, *task.y), saved[0], strict=True):
                p.data.copy_(value)
            inner.load_state_dict(saved[1])
            outer.load_state_dict(saved[2])
        for _ in range(steps):
            for _ in range(2):
                inner.step(task.lower)
            assign(task.x, implicit(task.upper, task.lower, task.x, task.y, products=products))
            outer.step(task.upper)
        state = copy.deepcopy([inner.state_dict(), outer.state_dict()])
        return [t.detach().clone() for t in (*task.x, *task.y)], state

    whole, _ = run(4)
    half, states = run(2)
    buffer = io.BytesIO()
    torch.save((half, *states), buffer)
    buffer.seek(0)
    resumed, _ = run(2, torch.load(buffer, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_copy_of_a_run_is_the_same_to_the_bit() -> None:
    task = Reweighting(model_of())
    inner = SLS(task.y)
    outer = BiSLS(task.x, lower=inner, products="difference")
    run = task, inner, outer

    def steps(run: Any) -> list[Tensor]:
        task, inner, outer = run
        for _ in range(2):
            inner.step(task.lower)
            assign(task.x, implicit(task.upper, task.lower, task.x, task.y, products="difference"))
            outer.step(task.upper)
        return [*task.x, *task.y]

    steps(run)
    copied = copy.deepcopy(run)
    assert all(torch.equal(a, b) for a, b in zip(steps(run), steps(copied), strict=True))


@pytest.mark.parametrize("resumed", [False, True])
def test_lengths_go_on_where_the_lower_tensors_are_new_in_each_step(resumed: bool) -> None:
    """A functional lower level: after the first step a product takes two gradients, also of a loaded optimizer."""
    task = Reweighting(model_of())
    names = [name for name, _ in task.model.named_parameters()]

    def losses(y: list[Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(task.model, dict(zip(names, y, strict=True)), (task.tokens,))
        return (found - task.target).square()

    def lower(y: list[Tensor]) -> Tensor:
        return (task.x[0].sigmoid() * losses(y)).mean() + 0.05 * sum(p.square().sum() for p in y)

    outer = BiSLS(task.x, hypergradient=Implicit(Lanczos(5)), products="difference", solver=Lanczos(5))
    spent = []
    for k in range(8):
        if resumed and k == 5:
            state = outer.state_dict()
            outer = BiSLS(task.x, hypergradient=Implicit(Lanczos(5)), products="difference", solver=Lanczos(5))
            outer.load_state_dict(state)
        before = outer.evaluations.lower.gradients
        outer.step(lambda y: losses(y).mean(), lower=([p.detach().clone() for p in task.y], lower))
        spent.append(outer.evaluations.lower.gradients - before)
    assert max(spent[5:]) < 0.8 * spent[0], spent
