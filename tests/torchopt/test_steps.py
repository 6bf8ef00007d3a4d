"""Lower and upper steps in TorchOpt: rules, and state that outlives solve()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import adaptive_bilevel as ab
from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, SPSMax
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel_torchopt import LowerStep, UpperStep
from tests.optim.helpers import plain
from tests.problems import ridge_hpo
from tests.torchopt.modules import EXACT_CG, SOLVE, implicit_module, iterate, leaf, pair

LOWER_RULES = [SPSMax, DecSPS, SPSB, SLS, SLSB, AutoSLS]


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


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_schedulers_scale_the_step_that_a_search_finds(level: str) -> None:
    inner, meta, _ = pair(ridge_hpo(), lower={"rule": SLS}, rule=BiSLS)
    iterate(inner, meta)
    optimizer: Any = inner.lower.optimizer if level == "lower" else meta.optimizer
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    for factor in (1.0, 0.1, 0.01):
        iterate(inner, meta)
        scheduler.step()
        found = optimizer.state["policy"]["previous"]
        assert optimizer.param_groups[0]["step_size"] == pytest.approx(factor * found)


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


def test_no_upper_warning_on_a_good_problem(recwarn: Any) -> None:
    inner, meta, _ = pair(ridge_hpo())
    for _ in range(25):
        iterate(inner, meta)
    assert not [w for w in recwarn if issubclass(w.category, AdaptiveBilevelWarning)]
