"""Where TorchOpt goes wrong without saying so: each case is handled here, or refused with the cause and the way out."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torchopt
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS, BiSPS
from adaptive_bilevel.errors import (
    AdaptiveBilevelError,
    ClosureError,
    HypergradientError,
    LowerLevelError,
    OptionError,
    SolverError,
    TensorError,
)
from adaptive_bilevel.policies import Constant, Outcome
from adaptive_bilevel_torchopt import FunctionalLowerStep, LowerStep, UpperStep
from adaptive_bilevel_torchopt.staleness import StalenessCheck
from tests.optim.helpers import plain
from tests.problems import Problem, b2, ridge_hpo
from tests.torchopt.modules import EXACT_CG, SOLVE, implicit_module, iterate, leaf, pair

Base = torchopt.nn.ImplicitMetaGradientModule


def snapshot(*things: Any) -> Any:
    return repr(plain([*things, torch.get_rng_state()]))


def stock(problem: Problem, **upper: Any) -> tuple[Any, Any, Tensor]:
    """A module that keeps TorchOpt's own loop, our upper step on x, and x."""
    x = leaf(problem)
    inner = implicit_module(EXACT_CG)(x, problem)
    return inner, UpperStep([x], lower=inner, **upper), x


def test_a_solution_is_a_new_tensor_and_the_steps_follow() -> None:
    inner, meta, _ = pair(ridge_hpo())
    first = inner.y
    inner.solve()
    assert inner.y is not first and not inner.y.is_leaf
    meta.step(inner.val)
    assert inner.y.is_leaf and inner.lower.optimizer.param_groups[0]["params"] == [inner.y]
    inner.solve()  # the warm start, which raises where the loop is TorchOpt's and nothing is detached
    meta.step(inner.val)


def test_a_subclass_that_has_lost_its_linear_solve_is_refused() -> None:
    class Derived(implicit_module(EXACT_CG)):  # type: ignore[misc]
        def solve(self) -> None: ...

    x = leaf(ridge_hpo())
    with pytest.raises(OptionError, match=r"does not inherit linear_solve.*hold a module instead"):
        Derived(x, ridge_hpo()).automatic()
    with pytest.raises(OptionError, match="does not inherit"):
        UpperStep([x], lower=Derived(x, ridge_hpo()))


@pytest.mark.parametrize("loop", ["ours", "its own"])
@pytest.mark.parametrize("what", ["x", "x.data", "y.data", "signs"])
def test_a_change_between_solve_and_the_upper_step_is_refused(what: str, loop: str) -> None:
    inner, meta, x = pair(b2()) if loop == "ours" else stock(b2())
    iterate(inner, meta)
    inner.solve()
    at = x.detach().clone()
    with torch.no_grad():
        if what == "x":
            x.add_(0.1)
        elif what == "signs":  # of the same norm
            x.neg_()
        else:
            (x if what == "x.data" else inner.y).data.add_(0.1)
    states = lambda: (meta.state_dict(), inner.lower.state_dict() if loop == "ours" else None)  # noqa: E731
    before = snapshot(x, inner.y, states())
    with pytest.raises(HypergradientError, match=r"changed between solve\(\) and the upper step.*right after solve"):
        meta.step(inner.val)
    assert snapshot(x, inner.y, states()) == before
    with torch.no_grad():
        x.copy_(at)
    inner.solve()
    meta.step(inner.val)


def swapped(t: Tensor, i: int, j: int) -> Tensor:
    flat = t.flatten().clone()
    flat[[i, j]] = flat[[j, i]]
    return flat.view_as(t)


# Changes that keep the sum and the sum of squares of all values.
REARRANGED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "two neighbours": lambda ts: [swapped(ts[0], 0, 1), *ts[1:]],
    "two swaps": lambda ts: [*ts[:2], swapped(swapped(ts[2], 0, 1), 4, 5), *ts[3:]],
    "far apart": lambda ts: [*ts[:-1], swapped(ts[-1], 3, 119_998)],
    "across the diagonal": lambda ts: [*ts[:-1], swapped(ts[-1], 5 * 4096 + 9, 9 * 4096 + 5)],
    "reversed": lambda ts: [t.flip(0) for t in ts],
    "rolled": lambda ts: [*ts[:-1], ts[-1].roll(4096)],
    "transposed": lambda ts: [*ts[:3], ts[3].T.contiguous(), *ts[4:]],
    "signs": lambda ts: [*ts[:2], torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0]).flip(0), *ts[3:]],
    "all signs": lambda ts: [*ts[:2], -ts[2], *ts[3:]],
    "two tensors": lambda ts: [ts[1], ts[0], *ts[2:]],
    "one more": lambda ts: [*ts, torch.zeros(3)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["upper", "lower"])
@pytest.mark.parametrize("name", REARRANGED)
def test_values_that_change_places_are_a_change(name: str, which: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(5)
    shapes = [(3,), (3,), (8,), (4, 4), (0,), (120_000,)]
    tensors = [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]
    tensors[2] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0], dtype=dtype)
    fixed = [torch.full((2,), float("nan"), dtype=dtype)]
    staleness = StalenessCheck()
    upper, lower = (tensors, fixed) if which == "upper" else (fixed, tensors)
    staleness.begin(upper)
    staleness.take(lower)
    assert staleness.check("test", [t.clone() for t in lower])
    changed = [t.to(dtype) for t in REARRANGED[name](tensors)]
    if which == "upper":
        staleness.upper = changed
    with pytest.raises(HypergradientError, match=f"{which} parameters changed"):
        staleness.check("test", lower if which == "upper" else changed)


def test_a_solution_that_solve_itself_changes_is_marked() -> None:
    problem = ridge_hpo()

    class Clamped(implicit_module(EXACT_CG)):  # type: ignore[misc]
        marks = True

        def solve(self) -> None:
            step = self.lower.attach()
            step(self.objective)
            self.y.data.clamp_(max=0.01)
            if self.marks:
                self.lower.mark()

    Clamped.linear_solve = EXACT_CG
    x = leaf(problem)
    inner = Clamped(x, problem).automatic()
    meta: Any = UpperStep([x], lower=inner.lower)
    iterate(inner, meta)
    inner.marks = False
    inner.solve()
    with pytest.raises(HypergradientError, match=r"end it with mark\(\)"):
        meta.step(inner.val)


def test_the_block_diagonal_dense_solver_is_refused() -> None:
    class Two(Base, linear_solve=SOLVE.solve_inv()):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.x = x
            self.weight, self.bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
            self.lower = LowerStep(self)

        def objective(self) -> Tensor:
            return (self.weight.sum() + self.bias - 1).square().sum() + (self.x * self.weight.square()).sum()

        def solve(self) -> None:
            self.lower.attach()(self.objective)

    x = torch.ones(3, requires_grad=True)
    inner = Two(x)
    meta: Any = UpperStep([x], lower=inner.lower)
    inner.solve()
    with pytest.raises(SolverError, match=r"diagonal blocks.*solve_cg\(\)"):
        meta.step(lambda: inner.weight.square().sum())


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_a_neumann_series_that_diverges_is_refused(upper: Any) -> None:
    problem = b2()  # ||H|| = 4.02
    inner, meta, x = pair(problem, linear_solve=SOLVE.solve_inv(ns=True, maxiter=50), rule=upper)
    inner.solve()
    at = x.detach().clone()
    with pytest.raises(SolverError, match=r"norm 4\.0.*alpha below 0\.49"):
        meta.step(inner.val)
    assert torch.equal(x, at) and x.grad is None
    inner, meta, x = pair(problem, linear_solve=SOLVE.solve_inv(ns=True, maxiter=50, alpha=0.4), rule=upper)
    iterate(inner, meta)
    assert not torch.equal(x, problem.x0)


def test_lower_parameters_without_a_dimension_are_refused() -> None:
    class Scalar(implicit_module(EXACT_CG)):  # type: ignore[misc]
        def __init__(self, x: Tensor) -> None:
            super().__init__(x, b2())
            self.y = nn.Parameter(torch.zeros(()))

        def solve(self) -> None:
            self.lower.attach()

    Scalar.linear_solve = EXACT_CG
    with pytest.raises(TensorError, match=r"torchopt#222.*shape \(1,\)"):
        Scalar(leaf(b2())).automatic().solve()
    lower = FunctionalLowerStep(lambda y: y.square())
    with pytest.raises(TensorError, match="#222"):
        lower.attach(torch.zeros(()))


@pytest.mark.parametrize("when", ["before", "after an upper step", "after a reset"])
def test_a_lower_parameter_that_is_frozen_is_refused(when: str) -> None:
    inner, meta, x = pair(ridge_hpo())
    if when != "before":
        iterate(inner, meta)
        for grad in (torch.no_grad(), torch.enable_grad()):  # solutions without a graph are nobody's wish
            with grad:
                inner.solve()
        x.requires_grad_(False)
        inner.solve()
        x.requires_grad_()
        iterate(inner, meta)
    if when == "after a reset":
        inner.lower.reset([torch.zeros(5)])
    at = snapshot(inner.y.requires_grad_(False), inner.lower.state_dict())
    with pytest.raises(TensorError, match=r"lower parameter 0 .* is frozen.*buffer"):
        inner.solve()
    assert snapshot(inner.y, inner.lower.state_dict()) == at and not inner.y.requires_grad
    inner.y.requires_grad_()
    iterate(inner, meta)


class Network(Base, linear_solve=SOLVE.solve_cg()):
    """A lower network on features of an upper one, with what a second evaluation disturbs."""

    def __init__(self, features: nn.Module, layers: list[nn.Module], lower: Any = SLS) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Sequential(nn.Linear(4, 3), *layers, nn.Linear(3, 2))
        self.lower: Any = LowerStep(self, lower) if lower is not None else None

    def objective(self, batch: Any) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return self.loss(batch) + 0.02 * penalty

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.features(batch[0])) - batch[1]).square().mean()

    def solve(self, batch: Any) -> None:
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(3):
                step(lambda: self.objective(batch))
            return
        params = tuple(self.parameters())
        optimizer = torchopt.SGD(params, lr=0.1)
        with torch.enable_grad():
            loss = self.objective(batch)
            loss.backward(inputs=params)
            optimizer.step()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(10, 5, generator=rng), torch.randn(10, 2, generator=rng)


def test_running_statistics_of_batch_norm_count_every_batch_once() -> None:
    """TorchOpt's own backward raises on them in train mode."""
    features = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    inner = Network(features, [nn.BatchNorm1d(3)])
    meta: Any = UpperStep(list(features.parameters()), lower=inner.lower)
    for k in range(3):
        inner.solve(batch(k))
        meta.step(lambda: inner.loss(batch(10 + k)))
        assert meta.record.moved
    for norm in (features[1], inner.head[1]):
        # Three lower steps and one upper step an iteration. A carried start is decided on the first lower sample.
        assert isinstance(norm, nn.BatchNorm1d) and norm.track_running_stats and norm.training
        assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 12
    reference = Network(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), [], lower=None)
    reference.solve(batch(0))
    with pytest.raises(RuntimeError, match="in-place"):
        reference.loss(batch(1)).backward()


def test_dropout_draws_the_mask_of_the_lower_step_again() -> None:
    torch.manual_seed(1)
    features = nn.Linear(5, 4)
    inner = Network(features, [nn.Dropout(0.5)], lower=Constant(bound=1e-12))
    meta: Any = UpperStep(list(features.parameters()), lower=inner.lower)
    train, val = batch(0), batch(1)
    inner.solve(train)
    assert inner.lower is not None
    optimizer: Any = inner.lower.optimizer
    x, y = ([p.detach().clone().requires_grad_() for p in ps] for ps in (features.parameters(), inner.parameters()))
    state = torch.get_rng_state()
    meta.step(lambda: inner.loss(val))
    after = torch.get_rng_state()
    h = torch.cat([p.grad.reshape(-1) for p in features.parameters() if p.grad is not None])

    # The same by hand, dense: one mask for the lower loss, one for the upper.
    optimizer.sample.random.restore()
    lower_mask = nn.functional.dropout(torch.ones(10, 3), 0.5)
    torch.set_rng_state(state)
    upper_mask = nn.functional.dropout(torch.ones(10, 3), 0.5)
    assert torch.equal(torch.get_rng_state(), after), "an upper step consumes what one evaluation consumes"

    def f(x: Any, y: Any, data: Any, mask: Tensor) -> Tensor:
        hidden = (data[0] @ x[0].T + x[1]) @ y[0].T + y[1]
        return (((hidden * mask) @ y[2].T + y[3]) - data[1]).square().mean()

    g = f(x, y, train, lower_mask) + 0.02 * torch.stack([p.square().sum() for p in y]).sum()
    g_y = torch.cat([t.reshape(-1) for t in torch.autograd.grad(g, y, create_graph=True)])
    H = torch.stack([torch.cat([t.reshape(-1) for t in torch.autograd.grad(v, y, retain_graph=True)]) for v in g_y])
    upper = f(x, y, val, upper_mask)
    f_y = torch.cat([t.reshape(-1) for t in torch.autograd.grad(upper, y, retain_graph=True)])
    f_x = torch.cat([t.reshape(-1) for t in torch.autograd.grad(upper, x)])
    cross = torch.autograd.grad(g_y @ torch.linalg.solve(H, f_y).detach(), x)
    expected = f_x - torch.cat([t.reshape(-1) for t in cross])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-7)


def test_dropout_in_a_loop_of_ones_own_is_refused() -> None:
    features = nn.Linear(5, 4)
    inner = Network(features, [nn.Dropout(0.5)], lower=None)
    meta: Any = UpperStep(list(features.parameters()), lower=inner)
    inner.solve(batch(0))
    state = torch.get_rng_state()
    with pytest.raises(HypergradientError, match=r"random numbers \(dropout\?\).*LowerStep"):
        meta.step(lambda: inner.loss(batch(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_in_eval_mode_is_not_taken_for_upper_parameters() -> None:
    features = nn.Linear(5, 4).eval()
    inner = Network(features, [])
    with pytest.raises(TensorError, match=r"eval mode.*torchopt#144.*\.train\(\)"):
        UpperStep(list(features.parameters()), lower=inner.lower)


def test_an_objective_with_a_dimension_is_refused() -> None:
    inner, _, _ = pair(ridge_hpo())
    step = inner.lower.attach()
    with pytest.raises(ClosureError, match=r"shape \(1,\).*scalars without a dimension"):
        step(lambda: inner.objective().reshape(1))


def test_a_module_is_copied_after_an_upper_step_or_a_cut() -> None:
    inner, meta, _ = pair(ridge_hpo())
    iterate(inner, meta)
    copy.deepcopy(inner)
    inner.solve()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(inner)
    inner.lower.cut()
    assert torch.equal(copy.deepcopy(inner).y, inner.y)


def test_optimality_that_torchopt_derives_is_never_called_by_us(monkeypatch: Any) -> None:
    """It takes several times as long as a backward."""
    inner, meta, _ = pair(ridge_hpo())
    calls: list[str] = []
    original = type(inner).optimality

    def traced(self: Any, *args: Any) -> Any:
        calls.append(sys._getframe(1).f_code.co_filename)
        return original(self, *args)

    monkeypatch.setattr(type(inner), "optimality", traced)
    iterate(inner, meta)
    assert calls and all("torchopt/diff" in name.replace("\\", "/") for name in calls)


def test_one_module_serves_all_tasks() -> None:
    inner, meta, x = pair(ridge_hpo())
    y = inner.y
    for value in (0.5, 0.25):
        iterate(inner, meta)
        inner.lower.reset([torch.full_like(y, value)])
        assert inner.y.tolist() == [value] * 5 and inner.y.is_leaf
    inner.lower.reset()  # to the meta-parameters, as in iMAML
    assert torch.equal(inner.y, x)
    with pytest.raises(TensorError, match="one tensor for each"):
        inner.lower.reset([torch.zeros(3)])


# ------------------------------------------------------------------------------------------ misuse


def test_an_unsolved_problem_is_refused() -> None:
    inner, meta, x = pair(ridge_hpo())
    with pytest.raises(HypergradientError, match=r"do not come from a solve\(\)"):
        meta.step(inner.val)
    with torch.no_grad():
        inner.solve()
    with pytest.raises(HypergradientError, match="gradients enabled"):
        meta.step(inner.val)
    inner.solve()
    with pytest.raises(HypergradientError, match=r"called solve\(\)"):
        meta.step(lambda: inner.solve().val())
    inner.solve()
    with pytest.raises(HypergradientError, match="depends on no meta-parameter"):
        meta.step(lambda: torch.ones(1, requires_grad=True).sum())
    assert torch.equal(x, ridge_hpo().x0)
    meta.step(inner.val)


def test_upper_parameters_that_torchopt_does_not_know_are_refused() -> None:
    problem = b2()
    x = leaf(problem)

    class Hidden(Base, linear_solve=EXACT_CG):
        def __init__(self, known: Tensor) -> None:
            super().__init__()
            self.known = known
            self.y = nn.Parameter(problem.y0.clone())
            self.lower = LowerStep(self, lr=0.1, lower_bound=None)

        def objective(self) -> Tensor:
            return problem.g(x, self.y) + self.known.square().sum() * self.y.square().sum()

        def solve(self) -> None:
            self.lower.attach()(self.objective)

    known = torch.ones(1, requires_grad=True)
    inner = Hidden(known)
    meta: Any = UpperStep([known, x], lower=inner.lower)
    inner.solve()
    with pytest.raises(HypergradientError, match="constructor of the implicit module"):
        meta.step(lambda: problem.f(x, inner.y))
    direct = torch.ones(1, requires_grad=True)  # an upper parameter that only f depends on is fine
    meta = UpperStep([known, direct], lower=inner.lower)
    inner.solve()
    meta.step(lambda: problem.f(x.detach(), inner.y) + direct.square().sum())


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("held", ["loss", "copy"])
@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
def test_one_module_for_two_tasks_of_an_upper_step_is_refused(make: Any, held: str, upper: Any) -> None:
    inner, meta, x = make(ridge_hpo(), rule=upper)
    iterate(inner, meta)
    inner.solve()
    first = inner.val() if held == "loss" else inner.y.clone()
    if held == "loss":
        inner.lower.reset([torch.zeros(5)]) if inner.lower else inner.y.detach_().requires_grad_()
    inner.solve()
    before = snapshot(x, inner.y, meta.state_dict())
    with pytest.raises(HypergradientError, match=r"One module serves one task.*FunctionalLowerStep"):
        meta.step(lambda: inner.val() + first.sum())
    assert snapshot(x, inner.y, meta.state_dict()) == before
    for other in {inner, inner.lower or inner}:
        with pytest.raises(OptionError, match=r"listed twice.*a module for each task"):
            UpperStep([x], upper, lower=[inner, other])
    inner.solve()
    meta.step(inner.val)


@pytest.mark.parametrize("make", [pair, stock], ids=["our loop", "its own loop"])
@pytest.mark.parametrize(("upper", "when"), [(BiSLS, "this"), (BiSLS, "the last"), (BiSPS, "the last")])
def test_an_upper_loss_from_before_the_step_is_refused(make: Any, upper: Any, when: str) -> None:
    inner, meta, x = make(ridge_hpo(), rule=upper)
    inner.solve()
    loss = inner.val() if when == "this" else x.exp().sum()
    if when == "the last":
        torch.autograd.grad(loss, x)
    before = snapshot(x, x.grad, meta.state_dict())
    with pytest.raises(ClosureError, match=r"computed before step\(\).*meta\.step\(lambda: val\(inner\)\)"):
        meta.step(lambda: inner.val() + loss)
    assert snapshot(x, x.grad, meta.state_dict()) == before
    inner.solve()
    meta.step(inner.val)


class OnlyOptimality(Base, linear_solve=SOLVE.solve_normal_cg(rtol=1e-12)):
    """A lower problem that is known by its optimality function, with a loop of its own."""

    def __init__(self, x: Tensor, problem: Problem, twist: float = 0.0) -> None:
        super().__init__()
        self.x, self.problem, self.twist = x, problem, twist
        self.y = nn.Parameter(problem.y0.clone())

    def optimality(self) -> tuple[Tensor, ...]:
        residual = torch.func.grad(self.problem.g, argnums=1)(self.x, self.y)
        return (residual + self.twist * torch.roll(self.y, 1),)

    def solve(self) -> None:
        self.y.data.copy_(self.problem.ystar(self.x.detach()))


def test_an_optimality_function_is_enough_for_the_response() -> None:
    problem = b2()
    x = leaf(problem)
    inner = OnlyOptimality(x, problem)
    with pytest.raises(OptionError, match=r"no objective\(\).*UpperStep\(lower=module\)"):
        LowerStep(inner)
    meta: Any = UpperStep([x], lower=inner)
    for _ in range(20):
        inner.y.detach_().requires_grad_()
        inner.solve()
        meta.step(lambda: problem.f(x, inner.y))
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-4)
    assert problem.dF(x.detach()).norm() < 0.05 * problem.dF(problem.x0).norm()


def test_an_optimality_function_that_is_no_gradient_is_refused_for_the_response_only() -> None:
    problem = b2()
    x = leaf(problem)
    inner = OnlyOptimality(x, problem, twist=1.0)
    meta: Any = UpperStep([x], lower=inner)
    inner.solve()
    with pytest.raises(SolverError, match="not symmetric"):
        meta.step(lambda: problem.f(x, inner.y))
    inner.y.detach_().requires_grad_()
    inner.solve()
    UpperStep([x], BiSPS, lower=inner).step(lambda: problem.f(x, inner.y))


def test_a_stock_loop_s_objective_is_known_from_its_solve() -> None:
    problem = ridge_hpo()
    inner, meta, x = stock(problem)
    other, meta2, x2 = stock(problem)
    for _ in range(10):
        iterate(inner, meta)
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
        iterate(other, meta2, lower_closure=other.objective)
    assert torch.equal(x, x2) and problem.F(x.detach()) < problem.F(problem.x0)


class Weighted(Base, linear_solve=EXACT_CG):
    """A lower problem whose objective is told a weight, as solve() is."""

    def __init__(self, x: Tensor, problem: Problem) -> None:
        super().__init__()
        self.x, self.problem = x, problem
        self.y = nn.Parameter(problem.ystar(x.detach()))

    def objective(self, weight: float, shift: float = 0.0) -> Tensor:
        return weight * self.problem.g(self.x, self.y) + shift * self.y.square().sum()

    def solve(self, weight: float, shift: float = 0.0) -> str:
        return f"{weight} {shift}"


def test_a_stock_loop_s_objective_gets_what_its_solve_got() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    inner = Weighted(x, problem)
    meta: Any = UpperStep([x], lower=inner)
    assert inner.solve(3.0, 0.7) == "3.0 0.7"
    meta.step(lambda: problem.f(x, inner.y))
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
    inner.solve(2.0)
    meta.step(lambda: problem.f(x, inner.y))
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)


def test_a_solve_that_was_not_seen_needs_the_closure() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    inner = implicit_module(EXACT_CG)(x, problem).solve()
    meta: Any = UpperStep([x], lower=inner)
    with pytest.raises(LowerLevelError, match=r"before there was an UpperStep.*lower_closure=lambda"):
        meta.step(inner.val)
    meta.step(inner.val, lower_closure=inner.objective)
    iterate(inner, meta)


def test_two_upper_steps_see_one_stock_loop() -> None:
    inner, meta, _ = stock(ridge_hpo())
    more: Any = UpperStep([inner.x], lower=inner)
    for each in (meta, more, meta):
        iterate(inner, each)
        assert each.record.slope_ratio == pytest.approx(1.0, abs=1e-6)
    other, meta2, x2 = copy.deepcopy((inner, meta, inner.x))
    iterate(inner, meta)
    iterate(other, meta2)
    assert torch.equal(x2, inner.x) and torch.equal(other.y, inner.y)


def tensor() -> Tensor:
    return torch.ones(1, requires_grad=True)


def solved(make: Any) -> Any:
    inner, meta, _ = make(ridge_hpo())
    inner.solve()
    return meta


def below(**options: Any) -> Any:
    return lambda: pair(ridge_hpo(), lower=options)


WRONG: dict[str, tuple[Any, type[AdaptiveBilevelError], str]] = {
    "no module": (lambda: LowerStep(cast(Any, nn.Linear(2, 2))), OptionError, "ImplicitMetaGradientModule"),
    "an instance": (lambda: below(rule=SLS([tensor()]))(), OptionError, "already belongs"),
    "an upper rule below": (below(rule=BiSLS), OptionError, "SPSMax, DecSPS"),
    "a lower rule above": (lambda: pair(ridge_hpo(), rule=SLS), OptionError, "BiSLS or BiSPS"),
    "an option": (below(c=2.0), OptionError, "c="),
    "two numbers": (below(rule=Constant(bound=0.1), lr=1.0), OptionError, "leave lr out"),
    "no objective": (lambda: FunctionalLowerStep(None), OptionError, "objective"),  # type: ignore[arg-type]
    "lower": (lambda: UpperStep([tensor()], lower=cast(Any, 3)), OptionError, "ImplicitMetaGradientModule"),
    "a closure": (lambda: pair(ridge_hpo())[1].step(None), ClosureError, "pass a function"),
    "a step's closure": (lambda: pair(ridge_hpo())[0].lower.attach()(None), ClosureError, "pass a function"),
    "a dictionary": (
        lambda: FunctionalLowerStep(lambda y: y["a"].sum()).attach({"a": torch.ones(2)}),
        TensorError,
        r"attach\(params=.*dict.*list or tuple of tensors.*values\(\)",
    ),
    "a number": (lambda: FunctionalLowerStep(lambda y: y.sum()).attach(1.0), TensorError, "float.*list or tuple"),
    "a nested list": (lambda: FunctionalLowerStep(sum).attach([[torch.ones(2)]]), TensorError, "list or tuple"),
    "integers": (lambda: FunctionalLowerStep(sum).attach([torch.ones(2).int()]), TensorError, "int32.*floating-point"),
    "a solution": (lambda: solved(pair).step(tensor().sum, solution=tensor()), OptionError, "solution="),
    "a solution of its own loop": (
        lambda: solved(stock).step(tensor().sum, solution=tensor()),
        OptionError,
        "solution=",
    ),
    "no attach": (lambda: pair(ridge_hpo())[0].lower.step(lambda: None), LowerLevelError, r"attach\(\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_names_the_remedy(name: str) -> None:
    make, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        make()


def test_unknown_options_raise_at_construction() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        pair(ridge_hpo(), lower={"nonsense": 1})
    with pytest.raises(TypeError, match="nonsense"):
        pair(ridge_hpo(), nonsense=1)


@pytest.mark.parametrize("rule", [SLS, Constant(bound=0.1)], ids=repr)
def test_constants_of_adam_are_refused_where_nothing_reads_them(rule: Any) -> None:
    for direction in ("sgd", torchopt.sgd(lr=1.0)):
        with pytest.raises(OptionError, match="betas is not used with direction"):
            pair(ridge_hpo(), lower={"rule": rule, "direction": direction, "betas": (0.5, 0.9)})
    pair(ridge_hpo(), lower={"rule": rule, "direction": "adam", "betas": (0.5, 0.9), "eps": 1e-4})


def functional(objective: Callable[..., Tensor], argnums: Any = 1) -> tuple[FunctionalLowerStep, Callable[..., Any]]:
    """A lower step, and a solver that takes one of them."""
    lower = FunctionalLowerStep(objective)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=argnums)
    def solve(y: Any, *given: Tensor) -> Any:
        y, step = lower.attach(y, *given)
        step()
        return y

    return lower, solve


def test_solutions_of_functional_solvers_are_matched_with_their_loops() -> None:
    problem = ridge_hpo()
    objective = lambda y, x: problem.g(x, y)  # noqa: E731
    lower, solve = functional(objective)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(problem.y0, x)
    f = lambda: problem.f(x, y)  # noqa: E731
    with pytest.raises(LowerLevelError, match="solution=None"):
        meta.step(f)
    with pytest.raises(LowerLevelError, match="shapes"):
        meta.step(f, solution=[y, y])
    lower.rewind()
    y = solve(problem.y0, x)
    with pytest.raises(LowerLevelError, match="shapes"):
        meta.step(f, solution=y[:2])
    with pytest.raises(HypergradientError, match="do not come from a solve"):
        meta.step(f, solution=problem.y0.clone())
    meta.step(f, solution=y)
    with pytest.raises(OptionError, match="pass it alone"):
        UpperStep([x], lower=[lower, lower])


def test_a_functional_objective_with_a_hidden_upper_variable_is_refused() -> None:
    problem = ridge_hpo()
    x, z = leaf(problem), torch.ones(1, requires_grad=True)
    objective = lambda y, x: problem.g(x, y) + z.square().sum() * y.square().sum()  # noqa: E731
    lower, solve = functional(objective)
    meta: Any = UpperStep([x, z], lower=lower)
    y: Any = solve(problem.y0, x)
    with pytest.raises(HypergradientError, match="argument that argnums names"):
        meta.step(lambda: problem.f(x, y), solution=y)


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("argnums", "depends", "refused"),
    [((1, 2), True, False), (1, True, True), (1, False, False), ((1, 2), False, False)],
)
def test_an_upper_variable_that_argnums_forgets_is_refused(
    argnums: Any, depends: bool, refused: bool, direct: bool, upper: Any
) -> None:
    problem = ridge_hpo()
    x, z = leaf(problem), torch.ones(1, requires_grad=True)
    objective = lambda y, x, z: problem.g(x, y) + (z.square().sum() * y.square().sum() if depends else 0)  # noqa: E731
    lower, solve = functional(objective, argnums)
    meta: Any = UpperStep([x, z], upper, lower=lower)
    y: Any = solve(problem.y0, x, z)
    f = lambda: problem.f(x, y) + (z.square().sum() + x.square().sum() if direct else 0.0)  # noqa: E731
    before = snapshot(x, z, x.grad, z.grad, meta.state_dict())
    if refused:
        with pytest.raises(HypergradientError, match="argument that argnums names"):
            meta.step(f, solution=y)
        assert snapshot(x, z, x.grad, z.grad, meta.state_dict()) == before
    else:
        meta.step(f, solution=y)
        assert meta.record.moved


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("computed", [lambda x: x.exp().log(), lambda x: x + 0.0], ids=["saved", "linear"])
def test_an_argument_that_is_computed_from_an_upper_parameter_is_refused(computed: Any, upper: Any) -> None:
    """A trial step would not change it."""
    problem = ridge_hpo()
    lower, solve = functional(lambda y, x: problem.g(x, y))
    x = leaf(problem)
    meta: Any = UpperStep([x], upper, lower=lower)
    y: Any = solve(problem.y0, computed(x))
    with pytest.raises(HypergradientError, match="argument that argnums names, and compute from them in the objective"):
        meta.step(lambda: problem.f(x, y), solution=y)


@pytest.mark.parametrize(("argnums", "match"), [(1, "depends on no meta-parameter.*argnums"), (2, "argnums=1")])
def test_argnums_that_name_no_upper_parameter_or_pass_one_over(argnums: int, match: str) -> None:
    """TorchOpt itself raises an IndexError unless argnums are the first ones."""
    problem = ridge_hpo()
    x, weight = leaf(problem), torch.ones(())
    objective = lambda y, weight, x: weight * problem.g(x, y)  # noqa: E731
    lower, solve = functional(objective, argnums)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(problem.y0, weight, x)
    with pytest.raises(HypergradientError, match=match):
        meta.step(lambda: problem.f(x.detach(), y), solution=y)


@pytest.mark.parametrize("name", ["BatchNorm", "dropout"])
def test_functional_solvers_refuse_what_their_backward_cannot_repeat(name: str) -> None:
    layer = nn.Dropout() if name == "dropout" else nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(5, 3), layer, nn.Linear(3, 2))
    names = [name for name, _ in net.named_parameters()]
    data = batch(0)

    def fit(y: Any) -> Tensor:
        out: Tensor = torch.func.functional_call(net, dict(zip(names, y, strict=True)), data[0])
        return (out - data[1]).square().mean()

    def objective(y: Any, x: Tensor) -> Tensor:
        return fit(y) + (x.exp() * torch.stack([p.square().sum() for p in y]).sum()).sum()

    lower, solve = functional(objective)
    x = torch.zeros(1, requires_grad=True)
    meta: Any = UpperStep([x], lower=lower)
    y: Any = solve(tuple(p.detach() for p in net.parameters()), x)
    with pytest.raises(HypergradientError, match=rf"{name}.*\.eval\(\)"):
        meta.step(lambda: fit(y), solution=y)
    lower.rewind()
    net.eval()
    y = solve(tuple(p.detach() for p in net.parameters()), x)
    meta.step(lambda: fit(y), solution=y)
    assert meta.record.moved


# ------------------------------------------------------------------------------------------ trials and memory


@pytest.mark.parametrize("at", range(5))
def test_whatever_an_exception_meets_is_as_before(at: int) -> None:
    inner, meta, x = pair(b2(), c=0.999, curvature=1e-9)  # many trials
    iterate_until_rejections = [0]
    inner.solve()
    x.grad = torch.full_like(x, 7.0)
    values = [t.detach().clone() for t in (x, inner.y)]
    state = snapshot(meta.state_dict(), inner.lower.state_dict()["param_groups"])

    def closure() -> Tensor:
        torch.rand(1)
        iterate_until_rejections[0] += 1
        if iterate_until_rejections[0] == at + 1:
            raise KeyboardInterrupt
        return inner.val()

    with pytest.raises(KeyboardInterrupt):
        meta.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(values, (x.detach(), inner.y.detach()), strict=True))
    assert x.grad is not None and x.grad.tolist() == [7.0, 7.0]
    assert snapshot(meta.state_dict(), inner.lower.state_dict()["param_groups"]) == state


def test_a_failed_search_moves_nothing() -> None:
    inner, meta, x = pair(b2(), max_trials=1, lr=1e6, lower_bound=None)
    inner.solve()
    before = [t.detach().clone() for t in (x, inner.y)]
    with pytest.warns(UserWarning, match="no trial step"):
        meta.step(inner.val)
    assert Outcome(meta.record.outcome) == Outcome.search_failed
    assert all(torch.equal(a, b) for a, b in zip(before, (x, inner.y), strict=True))


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_a_loss_that_is_not_finite_moves_nothing(upper: Any) -> None:
    inner, meta, x = pair(ridge_hpo(), rule=upper)
    iterate(inner, meta)
    inner.solve()
    before = snapshot(x, inner.y, meta.state_dict())
    meta.step(lambda: inner.val() * float("nan"))
    assert snapshot(x, inner.y, meta.state_dict()) == before and Outcome(meta.record.outcome) == Outcome.non_finite


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # isinstance() would wake lazy modules


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
def test_the_number_of_live_tensors_is_constant(upper: Any) -> None:
    inner, meta, _ = pair(ridge_hpo(), T=1, rule=upper, linear_solve=SOLVE.solve_cg(maxiter=2))
    counts = []
    for k in range(200):
        inner.lower.reset([torch.zeros(5)])
        iterate(inner, meta)
        if k in (9, 99, 199):
            counts.append(live_tensors())
    assert counts[0] == counts[1] == counts[2]


# ------------------------------------------------------------------------------------------ what is installed


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_without_torchopt_importing_says_what_to_install() -> None:
    done = run("import sys; sys.modules['torchopt'] = None; import adaptive_bilevel_torchopt")
    assert done.returncode != 0
    assert "ImportError: adaptive_bilevel_torchopt needs TorchOpt" in done.stderr
    assert "pip install 'adaptive-bilevel[torchopt]'" in done.stderr


def test_a_torchopt_that_does_not_import_says_why() -> None:
    """Where a later torch ships no functorch, installing TorchOpt again is no help."""
    done = run("import sys; sys.modules['functorch'] = None; import adaptive_bilevel_torchopt")
    assert done.returncode != 0 and "pip install" not in done.stderr
    assert "TorchOpt is installed, but importing it failed" in done.stderr and "functorch" in done.stderr


def test_betty_is_not_needed() -> None:
    forbidden = "import sys; sys.modules['betty'] = None; import adaptive_bilevel_torchopt; "
    done = run(forbidden + "print(sorted(name for name in sys.modules if 'betty' in name))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['betty']"
