"""Lower and upper steps in TorchOpt: its hypergradients, its updates to the bit, state that outlives solve()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import adaptive_bilevel as ab
from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, BiSPS, DecSPS, SPSMax
from adaptive_bilevel.errors import AdaptiveBilevelWarning, OptionError
from adaptive_bilevel.policies import Constant, Outcome
from adaptive_bilevel_torchopt import FunctionalLowerStep, LowerStep, Transformed, UpperStep
from tests.optim.helpers import plain
from tests.problems import Problem, b1, b2, ridge_hpo, softmax_toy
from tests.torchopt.modules import EXACT_CG, SOLVE, implicit_module, iterate, leaf, pair

custom_root = torchopt.diff.implicit.custom_root
LOWER_RULES = [SPSMax, DecSPS, SPSB, SLS, SLSB]
SOLVERS = {
    "default": None,
    "cg": SOLVE.solve_cg(rtol=1e-12),
    "normal-cg": SOLVE.solve_normal_cg(rtol=1e-12),
    "dense": SOLVE.solve_inv(),
    "neumann": SOLVE.solve_inv(ns=True, maxiter=300, alpha=0.45),
    "own": lambda matvec, b: SOLVE.solve_cg(rtol=1e-12)(matvec, b),
}


class Two(torchopt.nn.ImplicitMetaGradientModule, linear_solve=SOLVE.solve_cg()):
    """Ridge regression with weights and a bias, both levels in minibatches: plain, or with our steps."""

    def __init__(self, x: Tensor, dtype: torch.dtype = torch.float64, lower: Any = None) -> None:
        super().__init__()
        self.x = x
        self.weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        self.lower: Any = None if lower is None else LowerStep(self, lower)

    def fit(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (inputs @ self.weight + self.bias - targets).square().mean()

    def objective(self, batch: Any) -> Tensor:
        penalty = (self.x.exp()[:, None] * self.weight.square()).sum() + 0.1 * self.bias.square().sum()
        return self.fit(batch) + penalty

    def solve(self, batch: Any) -> None:
        params = tuple(self.parameters())
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(3):
                step(lambda: self.objective(batch))
            return
        for p in params:
            p.detach_().requires_grad_()
        optimizer = torchopt.SGD(params, lr=0.1)
        with torch.enable_grad():
            for _ in range(3):
                loss = self.objective(batch)
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()


def regression(count: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    rng = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    truth = normal(4, 2)
    inputs = [normal(12, 4) for _ in range(2 * count)]
    pairs = [(a, a @ truth + 0.3 * normal(12, 2)) for a in inputs]
    return list(zip(pairs[::2], pairs[1::2], strict=True))


# ------------------------------------------------------------------------------------------ hypergradients


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("problem", [b1(), b2(), ridge_hpo(), softmax_toy()], ids=lambda p: p.name)
def test_hypergradient_that_reaches_the_step_is_the_closed_form(problem: Problem, name: str) -> None:
    inner, meta, x = pair(problem, linear_solve=SOLVERS[name], T=1, lower={"lower_bound": None, "lr": 1e-3})
    inner.y.data.copy_(problem.ystar(x.detach()))
    expected = problem.dF(x.detach())
    iterate(inner, meta)
    assert x.grad is not None
    assert (x.grad - expected).norm() <= 1e-5 * expected.norm()
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-3), "the response is solved as TorchOpt solves"


def test_the_upper_loss_is_differentiated_with_the_lower_variable_fixed() -> None:
    problem = b2()  # f depends on x directly, too
    inner, meta, x = pair(problem, direction="sgd")
    at = x.detach().clone()
    inner.solve()
    y = inner.y.detach().clone()
    meta.step(inner.val)
    f_x, f_y = torch.func.grad(problem.f, argnums=(0, 1))(at, y)
    h = problem.hypergradient(at, y)
    w = torch.linalg.solve(problem.hessian(at, y), problem.cross(at, y).T @ h)
    assert meta.record.slope == pytest.approx(float(f_x @ h - f_y @ w), rel=1e-9)
    assert (f_x - h).norm() > 0.1 * h.norm(), "else the total gradient would pass, too"


def test_functional_hypergradient_is_the_closed_form() -> None:
    problem = ridge_hpo()
    solve, lower = functional(problem, T=1, rule=Constant(bound=1e-9))
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y = solve(problem.ystar(x.detach()), x)
    expected = problem.dF(x.detach())
    meta.step(lambda: problem.f(x, y), solution=y)
    assert x.grad is not None and (x.grad - expected).norm() <= 1e-5 * expected.norm()


# ------------------------------------------------------------------------------------------ the host's own updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("upper", "direction"), [("SGD", "sgd"), ("Adam", "adam"), ("Adam", torchopt.adam(lr=1.0))], ids=str
)
def test_constant_policies_are_torchopt_to_the_bit(upper: str, direction: Any, dtype: torch.dtype) -> None:
    lr = {"SGD": 0.3, "Adam": 0.03}[upper]
    ends = []
    for automatic in (False, True):
        x = torch.zeros(4, dtype=dtype, requires_grad=True)
        inner = Two(x, dtype, Constant(bound=0.1) if automatic else None)
        if automatic:
            meta: Any = UpperStep([x], Constant(bound=lr), lower=inner.lower, direction=direction)
        else:
            meta = getattr(torchopt, upper)([x], lr=lr)
        for train, val in regression(50, dtype):
            inner.solve(train)
            if automatic:
                meta.step(lambda: inner.fit(val))
            else:
                loss = inner.fit(val)
                meta.zero_grad()
                loss.backward()
                meta.step()
        ends.append([x.detach(), inner.weight.detach(), inner.bias.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert ends[0][0].abs().max() > 0.1, "it went somewhere"


@pytest.mark.parametrize("direction", ["adam", torchopt.adam(lr=1.0, betas=(0.95, 0.9), eps=1e-4)], ids=str)
def test_a_constant_step_is_taken_whether_the_direction_descends_or_not(direction: Any) -> None:
    """Adam's does not, after it has passed a minimum: TorchOpt steps on."""
    problem = ridge_hpo()
    adam: Any = {"betas": (0.95, 0.9), "eps": 1e-4}
    inner, meta, x = pair(
        problem,
        lower={"rule": Constant(bound=0.1)},
        rule=Constant(bound=0.3),
        direction=direction,
        **(adam if direction == "adam" else {}),
    )
    x2 = leaf(problem)
    plain_inner = implicit_module(EXACT_CG)(x2, problem)
    plain_meta: Any = torchopt.Adam([x2], lr=0.3, **adam)
    ascents = 0
    for _ in range(50):
        iterate(inner, meta)
        plain_inner.solve()
        plain_meta.zero_grad()
        plain_inner.val().backward()
        before = x2.detach().clone()
        plain_meta.step()
        assert x2.grad is not None
        ascents += bool((before - x2.detach()) @ x2.grad < 0.0)
    assert torch.equal(x, x2) and torch.equal(inner.y, plain_inner.y)
    assert ascents >= 3


@pytest.mark.parametrize("decay", ["inverse_sqrt", "inverse"])
def test_a_constant_policy_may_decay(decay: Any) -> None:
    inner, meta, _ = pair(ridge_hpo(), lower={"rule": Constant(bound=0.1)}, rule=Constant(bound=0.2, decay=decay))
    steps = [float(iterate(inner, meta).step_size) for _ in range(4)]
    power = {"inverse_sqrt": 0.5, "inverse": 1.0}[decay]
    assert steps == pytest.approx([0.2 / (k + 1) ** power for k in range(4)])


# ------------------------------------------------------------------------------------------ rules and state


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("rule", LOWER_RULES)
def test_every_rule_steps_inside_solve_with_state_that_outlives_it(rule: Any, upper: Any) -> None:
    problem = ridge_hpo()
    inner, meta, x = pair(problem, lower={"rule": rule}, rule=upper)
    inner.solve()
    optimizer = inner.lower.optimizer
    meta.step(inner.val)
    for _ in range(14):
        iterate(inner, meta)
    assert inner.lower.optimizer is optimizer and isinstance(optimizer, rule)
    clocked = upper is BiSPS and rule in (SPSMax, DecSPS, SPSB)  # beta_b,k of eq. (11)
    assert optimizer.state["policy"]["count"] == (15 if clocked else 150)
    assert optimizer.param_groups[0]["params"] == [inner.y] and inner.y.is_leaf
    assert problem.F(x.detach()) < problem.F(problem.x0)


def test_bounds_of_polyak_rules_follow_the_upper_iterations_of_bisps() -> None:
    inner, meta, _ = pair(ridge_hpo(), lower={"rule": SPSB, "lr": 1e-3}, rule=BiSPS, lr=0.1)
    bounds = []
    for _ in range(4):
        iterate(inner, meta)
        bounds.append(inner.lower.optimizer.record.bound)
    assert bounds == pytest.approx([1e-3 / (k + 1) ** 0.5 for k in range(4)])


def test_policies_name_a_rule_with_its_options() -> None:
    inner, meta, _ = pair(
        ridge_hpo(),
        lower={"rule": ab.policies.SLS(start=2.0, c=0.3)},
        rule=ab.policies.Envelope(bound=5.0, floor=0.5, decay="inverse", floor_decay="inverse"),
    )
    iterate(inner, meta)
    assert isinstance(inner.lower.optimizer, SLS) and isinstance(meta.optimizer, BiSPS)
    group = inner.lower.optimizer.param_groups[0]
    assert (group["lr"], group["c"]) == (2.0, 0.3)
    assert (meta.param_groups[0]["lr"], meta.param_groups[0]["lr_min"]) == (5.0, 0.5)


def test_warm_start_goes_on_from_the_last_solution() -> None:
    inner, meta, _ = pair(ridge_hpo(), T=3, carry=False)
    iterate(inner, meta)
    before = inner.y.detach().clone()
    losses = []
    inner.lower.optimizer.register_step_pre_hook(lambda *a: losses.append(inner.y.detach().clone()))
    inner.solve()
    assert torch.equal(losses[0], before)
    inner.solve()  # again without an upper step, as a stochastic method may
    assert not torch.equal(losses[3], before)


def test_two_groups_of_meta_parameters_share_one_step() -> None:
    problem = ridge_hpo()
    xs = [problem.x0[:2].clone().requires_grad_(), problem.x0[2:].clone().requires_grad_()]

    class Split(torchopt.nn.ImplicitMetaGradientModule, linear_solve=SOLVE.solve_cg()):
        def __init__(self, a: Tensor, b: Tensor) -> None:
            super().__init__()
            self.a, self.b = a, b
            self.y = torch.nn.Parameter(problem.y0.clone())
            self.lower = LowerStep(self)

        def objective(self) -> Tensor:
            return problem.g(torch.cat([self.a, self.b]), self.y)

        def solve(self) -> None:
            step = self.lower.attach()
            for _ in range(5):
                step(self.objective)

    inner = Split(*xs)
    groups: list[dict[str, Any]] = [{"params": [xs[0]]}, {"params": [xs[1]], "lr": 0.0}]
    meta: Any = UpperStep(groups, lr=1.0, lower=inner.lower)
    inner.solve()
    meta.step(lambda: problem.f(torch.cat(xs), inner.y))
    assert not torch.equal(xs[0].detach(), problem.x0[:2]) and torch.equal(xs[1].detach(), problem.x0[2:])


@pytest.mark.filterwarnings("ignore:.*does not descend")
def test_resuming_is_bitwise(tmp_path: Any) -> None:
    def fresh() -> Any:
        return pair(ridge_hpo(), direction=torchopt.adam(lr=1.0), lower={"direction": torchopt.adam(lr=1.0)})

    inner, meta, x = fresh()
    for _ in range(5):
        iterate(inner, meta)
    saved = {"x": x, "y": inner.state_dict(), "lower": inner.lower.state_dict(), "meta": meta.state_dict()}
    torch.save(saved, tmp_path / "saved")
    for _ in range(5):
        iterate(inner, meta)
    other, meta2, x2 = fresh()
    loaded = torch.load(tmp_path / "saved", weights_only=True)
    x2.data.copy_(loaded["x"])
    other.load_state_dict(loaded["y"])
    other.lower.load_state_dict(loaded["lower"])
    meta2.load_state_dict(loaded["meta"])
    for _ in range(5):
        iterate(other, meta2)
    assert torch.equal(x, x2) and torch.equal(inner.y, other.y)
    assert plain(inner.lower.state_dict()) == plain(other.lower.state_dict())
    assert plain(meta.state_dict()) == plain(meta2.state_dict())


def test_both_levels_are_deep_copied_together() -> None:
    inner, meta, x = pair(ridge_hpo())
    iterate(inner, meta)
    other, meta2, x2 = copy.deepcopy((inner, meta, x))
    for _ in range(3):
        iterate(inner, meta)
        iterate(other, meta2)
    assert x2 is not x and torch.equal(x, x2) and torch.equal(inner.y, other.y)


# ------------------------------------------------------------------------------------------ functional solvers


def functional(problem: Problem, T: int = 10, rule: Any = SLS) -> tuple[Any, FunctionalLowerStep]:
    objective = lambda y, x, weight=1.0: weight * problem.g(x, y)  # noqa: E731
    lower = FunctionalLowerStep(objective, rule, linear_solve=EXACT_CG)

    @custom_root(torch.func.grad(objective), argnums=1, solve=EXACT_CG)
    def solve(y: Any, x: Any, weight: float = 1.0) -> Any:
        y, step = lower.attach(y, x, weight)
        for _ in range(T):
            step()
        return y

    return solve, lower


def test_a_functional_solver_takes_the_steps_of_the_module() -> None:
    problem = ridge_hpo()
    inner, meta, x = pair(problem)
    solve, lower = functional(problem)
    x2 = leaf(problem)
    meta2 = UpperStep([x2], lower=lower)
    y: Any = problem.y0
    for _ in range(8):
        iterate(inner, meta)
        y = solve(y.detach(), x2)
        meta2.step(lambda: problem.f(x2, y), solution=y)
    assert torch.equal(x, x2) and torch.equal(inner.y, y)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_functional_solver_may_have_several_tensors_and_more_to_return(kind: Any) -> None:
    problem = ridge_hpo()
    whole, meta, x = pair(problem, T=5)
    objective = lambda y, x: problem.g(x, torch.cat(list(y)))  # noqa: E731
    lower = FunctionalLowerStep(objective, linear_solve=EXACT_CG)

    @custom_root(torch.func.grad(objective), argnums=1, has_aux=True, solve=EXACT_CG)
    def solve(y: Any, x: Any) -> Any:
        y, step = lower.attach(y, x)
        assert type(y) is kind
        losses = [float(step().detach()) for _ in range(5)]
        return tuple(y), losses

    x2 = leaf(problem)
    meta2: Any = UpperStep([x2], lower=lower)
    y = kind(problem.y0.split([2, 3]))
    for _ in range(4):
        iterate(whole, meta)
        y, losses = solve(kind(y), x2)
        meta2.step(lambda: problem.f(x2, torch.cat(list(y))), solution=kind(y))
        assert losses[-1] <= losses[0]
    torch.testing.assert_close(x, x2, rtol=1e-9, atol=0.0)


def test_a_meta_batch_of_tasks_is_one_upper_step() -> None:
    problem, weights = ridge_hpo(), (1.0, 2.0, 0.5)
    solve, lower = functional(problem, T=30)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    expected = problem.dF(x.detach())
    for iteration in range(5):
        ys = [solve(problem.y0, x, w) for w in weights]  # the same solution, three times
        meta.step(lambda: torch.stack([problem.f(x, y) for y in ys]).mean(), solution=ys)
        if iteration == 0:
            assert x.grad is not None and (x.grad - expected).norm() < 1e-2 * expected.norm()
        assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-4)
    assert meta.optimizer.state["policy"]["count"] == 5
    assert len(lower.state_dict()["tasks"]) == 3
    assert problem.F(x.detach()) < problem.F(problem.x0)


def test_modules_of_a_meta_batch_share_one_upper_step() -> None:
    problem = ridge_hpo()
    x = leaf(problem)
    Module = implicit_module(EXACT_CG)
    inners = [Module(x, problem, 200).automatic() for _ in range(2)]
    meta: Any = UpperStep([x], lower=[inner.lower for inner in inners])
    expected = problem.dF(x.detach())
    for inner in inners:
        inner.solve()
    meta.step(lambda: inners[0].val() + inners[1].val())
    assert x.grad is not None and (x.grad - 2 * expected).norm() < 1e-3 * expected.norm()
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-6)


def test_functional_state_is_saved_before_the_tasks_are_met(tmp_path: Any) -> None:
    problem = ridge_hpo()
    solve, lower = functional(problem)
    x = leaf(problem)
    meta: Any = UpperStep([x], lower=lower)
    y = solve((problem.y0)[:], x)
    meta.step(lambda: problem.f(x, y), solution=[y])
    torch.save(lower.state_dict(), tmp_path / "saved")
    solve2, lower2 = functional(problem)
    lower2.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    assert plain(lower2.state_dict()) == plain(lower.state_dict())
    ends = [s(problem.y0, x.detach().requires_grad_()) for s in (solve, solve2)]
    assert torch.equal(*ends)


# ------------------------------------------------------------------------------------------ directions

DIRECTIONS = {
    "adam": torchopt.adam(lr=1.0),
    "adamw": torchopt.adamw(lr=1.0, weight_decay=1e-4),
    "rmsprop": torchopt.rmsprop(lr=1.0),
    "radam": torchopt.radam(lr=1.0),
    "adagrad": torchopt.adagrad(lr=1.0),
    "momentum": torchopt.sgd(lr=1.0, momentum=0.5),
    "decay": torchopt.adam(lr=1.0, weight_decay=1e-4),
    "clipped": torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=0.1), torchopt.adam(lr=1.0)),
    "scaled": torchopt.sgd(lr=0.01),
}


@pytest.mark.parametrize("upper", [BiSLS, BiSPS])
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.filterwarnings("ignore:.*does not descend")
def test_any_transformation_is_an_upper_direction_with_its_true_slope(name: str, upper: Any) -> None:
    problem, transformation = ridge_hpo(), DIRECTIONS[name]
    inner, meta, x = pair(problem, direction=transformation, rule=upper, T=20)
    memory = transformation.init([x])
    moved = 0
    for _ in range(12):
        at = x.detach().clone()
        inner.solve()
        meta.step(inner.val)
        h = x.grad
        assert h is not None
        updates, memory = transformation.update([h.clone()], memory, params=[at], inplace=False)
        slope = -float(h @ updates[0])
        assert meta.record.slope == pytest.approx(slope, rel=1e-6)
        if meta.record.moved:
            moved += 1
            assert torch.equal(x.detach(), at + updates[0] * meta.record.step_size), "scaled, then added"
        else:
            assert slope <= 0.0 and meta.record.outcome == Outcome.no_descent and torch.equal(x.detach(), at)
    assert moved >= 3
    assert problem.F(x.detach()) < problem.F(problem.x0)


def test_a_pair_of_transformations_is_adam_as_in_the_paper() -> None:
    pair_of = Transformed(torchopt.adam(lr=1.0), torchopt.adam(lr=1.0, betas=(0.0, 0.999)))
    ends = []
    for given in ({"direction": pair_of}, {"direction": "adam", "momentum": True}):
        options: dict[str, Any] = {**given, "carry": False}
        inner, meta, x = pair(ridge_hpo(), **options)
        for _ in range(4):
            iterate(inner, meta)
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (torchopt.Adam, "lower case"),
        ("rmsprop", "GradientTransformation"),
        (3, "GradientTransformation"),
    ],
)
def test_other_directions_are_refused(wrong: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        pair(ridge_hpo(), direction=wrong)


def test_a_transformation_s_memory_starts_anew_with_other_parameters() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer: Any = SLS([a, b], direction=Transformed(torchopt.adam(lr=1.0)))
    optimizer.step(lambda: (a**2).sum() + (b**2).sum())
    optimizer.step(lambda: (a**2).sum())
    assert optimizer.state["direction"]["shapes"] == [(2,)]
    optimizer.step(lambda: (a**2).sum() + (b**2).sum())
    assert optimizer.record is not None and optimizer.record.moved


def test_no_upper_warning_on_a_good_problem(recwarn: Any) -> None:
    inner, meta, _ = pair(ridge_hpo())
    for _ in range(25):
        iterate(inner, meta)
    assert not [w for w in recwarn if issubclass(w.category, AdaptiveBilevelWarning)]


def test_the_solver_is_of_the_declared_kind_unless_one_is_given() -> None:
    for name, kind in {
        "default": "NormalCG",
        "cg": "CG",
        "dense": "Dense",
        "neumann": "SafeNeumann",
        "own": "Called",
    }.items():
        inner, meta, _ = pair(ridge_hpo(), linear_solve=SOLVERS[name])
        iterate(inner, meta)
        assert type(meta.optimizer.solver).__name__ == kind
    inner, meta, _ = pair(ridge_hpo(), solver=ab.hypergradient.CG(max_iterations=7))
    iterate(inner, meta)
    assert meta.optimizer.solver == ab.hypergradient.CG(max_iterations=7)


RIDGES = {
    "cg": SOLVE.solve_cg(ridge=0.3),
    "normal-cg": SOLVE.solve_normal_cg(ridge=0.3),
    "neumann": SOLVE.solve_inv(ns=True, alpha=0.2, maxiter=200, ridge=0.3),
    "dense": SOLVE.solve_inv(ridge=0.3),
}


@pytest.mark.parametrize("name", RIDGES)
def test_a_ridge_is_kept(name: str) -> None:
    problem = ridge_hpo()
    inner, meta, _ = pair(problem, linear_solve=RIDGES[name], T=30)
    iterate(inner, meta)
    assert meta.record.slope_ratio == pytest.approx(1.0, abs=1e-3)
