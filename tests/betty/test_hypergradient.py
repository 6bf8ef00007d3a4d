"""Hypergradients inside Betty's graph: its neumann and our adaptive_cg are right, its cg is not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import betty.hypergradient
import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel.errors import LowerLevelError, OptionError
from adaptive_bilevel.hypergradient import CG, Neumann
from adaptive_bilevel_betty import SLS, BiSLS, adaptive_cg, bind
from tests.betty.problems import Level, Ridge, Variable, engine, gradients_of_steps, only_new, sgd, state

TIGHT = CG(max_iterations=100, tolerance=1e-10)


def hypergradient(toy: Ridge, x: Tensor, solver: Any = None, bound: bool = True, **config: Any) -> Tensor:
    """What Betty puts into .grad of the upper variable, the lower one being at its solution."""
    top, low = toy.levels(sgd(0.0), sgd(0.0), x=x, solved=True, T=1, **config)
    made = engine(low, top, steps=1)
    if bound:
        bind(made, solver=solver)
    seen = gradients_of_steps(top)
    made.run()
    return seen[0]


def exact(toy: Ridge, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (h,) = torch.autograd.grad(toy.F(x), x)
    return h


@pytest.mark.parametrize("seed", range(3))
def test_closed_form(seed: int) -> None:
    """Relative errors at y*(x): neumann and adaptive_cg below 1e-5; Betty's cg beside them, for the record."""
    toy = Ridge(seed)
    x = 0.5 * torch.randn(toy.d, generator=torch.Generator().manual_seed(seed))
    h = exact(toy, x)
    rows = {
        "neumann": hypergradient(toy, x, bound=False, type="neumann", neumann_iterations=200, neumann_alpha=0.2),
        "adaptive_cg": hypergradient(toy, x, TIGHT, type="adaptive_cg"),
        "cg": hypergradient(toy, x, bound=False, type="cg", cg_iterations=20),
    }
    errors = {name: float((value - h).norm() / h.norm()) for name, value in rows.items()}
    print(seed, errors)
    assert errors["neumann"] < 1e-5
    assert errors["adaptive_cg"] < 1e-5
    assert errors["cg"] > 1e-3  # if this fails, Betty has mended it


@pytest.mark.parametrize("solver", [None, CG(), TIGHT, Neumann(200, 0.2)])
def test_the_solver_decides_how_exact_it_is(solver: Any) -> None:
    toy, x = Ridge(), torch.zeros(8)
    error = float((hypergradient(toy, x, solver, type="adaptive_cg") - exact(toy, x)).norm() / exact(toy, x).norm())
    assert error < (0.2 if solver in (None, CG()) else 1e-5)


def test_the_solver_is_that_of_the_upper_optimizer() -> None:
    top, low = Ridge().levels(lambda p: BiSLS(p, solver=TIGHT), SLS, type="adaptive_cg")
    made = bind(engine(low, top, steps=10))
    made.run()
    # One inverse for both: the slope is what the hypergradient promises, also far from the lower solution.
    assert top.optimizer.record.slope_ratio == pytest.approx(1.0, rel=1e-8)


def test_a_replay_sees_all_micro_batches_and_the_same_dropout_mask() -> None:
    """With gradient accumulation, the Hessian is that of the step, not of its last micro-batch."""
    batches = [(torch.full((2,), float(i)),) for i in (1, 2)]
    masks: list[Tensor] = []

    def lower(problem: Any, batch: Any) -> Tensor:
        mask = nn.functional.dropout(torch.ones(2), 0.5)
        masks.append(mask)
        y: Tensor = problem.module()
        return 0.5 * ((1 + batch[0]) * y.square()).sum() - (y * (problem.outer() + mask)).sum()

    low = Level(
        "inner", lower, Variable(torch.zeros(2)), sgd(0.0), batches, type="adaptive_cg", gradient_accumulation=2
    )
    top = Level("outer", lambda p, b: p.inner().sum(), Variable(torch.zeros(2)), sgd(1.0), retain_graph=True)
    bind(engine(low, top, steps=2), solver=TIGHT).run()
    assert torch.allclose(top.value, torch.full((2,), -1 / 2.5))
    assert [m.tolist() for m in masks[:2]] == [m.tolist() for m in masks[2:]]


def test_buffers_and_random_state_are_left_alone() -> None:
    """The graph of the upper loss holds the batch norm's buffers while the lower loss is evaluated again."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=draws)
    ends = []
    for kind in ("adaptive_cg", "darts"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        low = Level("inner", lambda p, b: (p.outer().exp() * p.module(x).square()).mean(), module, sgd(0.0), type=kind)
        top = Level("outer", lambda p, b: (p.inner(x) - 1).square().mean(), Variable(torch.zeros(3)), sgd(0.0))
        made = bind(engine(low, top, steps=1))
        made.run()
        ends.append(module.state_dict()["1.num_batches_tracked"].item())
    assert ends[0] == 2  # one lower, one upper
    assert ends[1] == 4  # darts evaluates the lower loss twice more, and leaves it


def test_the_type_is_registered_under_a_name_of_its_own() -> None:
    """Nothing that was there is changed, and nothing before bind."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import betty.hypergradient as h; before = dict(h.jvp_fn_mapping)\n"
        "import adaptive_bilevel_betty as a; assert h.jvp_fn_mapping == before\n"
        "from tests.betty.problems import *\n"
        "top, low = Ridge().levels(a.BiSLS, a.SLS); made = engine(low, top, steps=1)\n"
        "assert h.jvp_fn_mapping == before; a.bind(made)\n"
        "assert h.jvp_fn_mapping == {**before, 'adaptive_cg': a.adaptive_cg}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert adaptive_cg.__name__ == "adaptive_cg"


def test_a_name_that_is_taken() -> None:
    mapping = betty.hypergradient.jvp_fn_mapping
    before = mapping.get("adaptive_cg")
    mapping["adaptive_cg"] = print
    try:
        top, low = Ridge().levels(BiSLS, SLS)
        with pytest.raises(OptionError, match="rename yours"):
            bind(engine(low, top))
    finally:
        mapping["adaptive_cg"] = before or adaptive_cg


def test_an_engine_that_is_not_bound() -> None:
    bind(engine(*reversed(Ridge().levels(sgd(0.1), sgd(0.1)))))  # another one is, so the type is known
    top, low = Ridge().levels(sgd(0.1), sgd(0.1), type="adaptive_cg", T=1)
    with pytest.raises(LowerLevelError, match=r"bind\(engine\)"):
        engine(low, top, steps=1).run()


def test_warm_starts_belong_to_the_problem() -> None:
    toy = Ridge()
    solver = CG(max_iterations=3, tolerance=0.0, warm_start=True)
    top, low = toy.levels(sgd(0.0), sgd(0.0), solved=True, T=1, type="adaptive_cg")
    made = bind(engine(low, top, steps=12), solver=solver)
    seen = gradients_of_steps(top)
    made.run()
    h = exact(toy, torch.zeros(8))
    errors = [float((s - h).norm() / h.norm()) for s in seen]
    assert errors[-1] < 1e-3 * errors[0]


@only_new
def test_only_some_lower_parameters_answer() -> None:
    """Betty 0.2: the others are constants for the hypergradient."""
    toy, x = Ridge(), torch.zeros(8)
    y = toy.solve(x)
    top, low = toy.levels(sgd(0.0), sgd(0.0), T=1, type="adaptive_cg")
    parts = [Variable(y[:5]), Variable(y[5:])]
    module: Any = nn.ModuleList(parts)
    module.forward = lambda: torch.cat([part() for part in parts])
    low._start = module
    low.meta_trainable_parameters = lambda: list(parts[0].parameters())
    made = bind(engine(low, top, steps=1), solver=TIGHT)
    seen = gradients_of_steps(top)
    made.run()
    H = (toy.A.T @ toy.A / len(toy.b) + torch.diag(x.exp()))[:5, :5]
    f_y = (toy.Av.T @ (toy.Av @ y - toy.bv) / len(toy.bv))[:5]
    assert torch.allclose(seen[0][:5], -y[:5] * torch.linalg.solve(H, f_y), rtol=1e-8)
    assert not seen[0][5:].any()


@only_new
def test_a_lower_problem_that_returns_a_dictionary() -> None:
    """Betty's own types cannot differentiate {"loss": ...}; ours can."""
    toy = Ridge()
    top, low = toy.levels(sgd(0.0), sgd(0.0), solved=True, T=1, type="adaptive_cg")
    lower = low._loss
    low._loss = lambda p, b: {"loss": lower(p, b), "other": 1.0}
    made = bind(engine(low, top, steps=1), solver=TIGHT)
    seen = gradients_of_steps(top)
    made.run()
    assert torch.allclose(seen[0], exact(toy, torch.zeros(8)), rtol=1e-6)
    assert state(made)


@only_new
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_lowest_of_three_levels_may_train_a_part_of_its_module(requires_grad: bool) -> None:
    """z*(y) = y with the other parameter o fixed: G(y) = (y - x)^2 + y^2 / 2 + (o - y)^2 / 2 + o y^2."""

    class Part(Level):
        def trainable_parameters(self) -> Any:
            return [self.module[0]]

    z, o = (torch.nn.Parameter(torch.tensor([v])) for v in (0.3, 0.7))
    o.requires_grad_(requires_grad)
    still = sgd(0.0)

    def middle(problem: Any, batch: Any) -> Tensor:
        (z, o), y = problem.low.module, problem.module()
        value: Tensor = ((y - problem.outer()) ** 2 + 0.5 * z**2 + 0.5 * (o - y) ** 2 + z * o * y).sum()
        return value

    def lowest(problem: Any, batch: Any) -> Tensor:
        (z, o), y = problem.module, problem.mid()
        value: Tensor = ((z - y) ** 2 + 0.5 * (o - 2 * y) ** 2).sum()
        return value

    options: dict[str, Any] = {"type": "adaptive_cg", "retain_graph": True}
    low = Part("low", lowest, torch.nn.ParameterList([z, o]), still, **options)
    mid = Level("mid", middle, Variable(torch.tensor([0.3])), still, **options)
    top = Level("outer", lambda p, b: 0.5 * (p.mid() - 2).square().sum(), Variable(torch.tensor([1.0])), still)
    made = bind(engine(low, mid, top), solver=CG(100, 1e-12))
    seen = gradients_of_steps(top)
    made.run()
    assert float(seen[0]) == pytest.approx((0.3 - 2.0) * 2.0 / (4.0 + 2.0 * 0.7))
