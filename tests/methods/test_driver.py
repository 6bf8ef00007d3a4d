"""What an iteration does: adaptive steps, projection, dtypes, records, and numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import methods, policies
from adaptive_bilevel.errors import AdaptiveBilevelWarning, NonFiniteError
from adaptive_bilevel.hypergradient import Neumann
from adaptive_bilevel.methods import rows
from tests.methods.helpers import finite, problem_of, run
from tests.problems import b2, ridge_hpo


@pytest.mark.parametrize("row", ["ba", "stocbio", "soba", "amigo", "unroll-truncated", "d-tfbo"])
def test_adaptive_steps_make_progress(row: str) -> None:
    problem = ridge_hpo()
    options = {"upper_step": policies.SLS(), "lower_step": policies.SLS(), "lower_steps": 5}
    if "v" in rows.ROWS[row].variables:
        options["auxiliary_step"] = policies.SLS(start=1.0, lower_bound=None)
    if row == "stocbio":
        options["solver"] = Neumann(20, 0.2)
    *_, last = run(row, problem, 15, **options)
    assert problem.F(last.x) < 0.75 * problem.F(problem.x0)


def test_a_polyak_step_takes_the_bound_of_the_sample() -> None:
    problem = b2()
    records = run(
        "stocbio",
        problem,
        5,
        lower_step=policies.SPSMax(bound=10.0, lower_bound=None),
        lower_bound=lambda x, _: float(problem.g(x, problem.ystar(x))),
    )
    assert finite(records)


SETS: dict[str, Any] = {"box": methods.Box(-0.3, 0.4), "ball": methods.Ball(0.7), "simplex": methods.Simplex(1.0)}


@pytest.mark.parametrize("name", ["ttsa", "stable", "soba", "bome", "bisls-sgd", "bisps", "s-tfbo"])
@pytest.mark.parametrize("kind", [*SETS, "callable"])
def test_x_stays_in_the_set(kind: str, name: str) -> None:
    problem = ridge_hpo()
    project = SETS.get(kind, lambda tensors: [t.clamp_(-0.3, 0.4) for t in tensors])
    for record in run(name, problem, 4, project=project, x=10 * problem.x0):
        projected = record.x.clone()
        project([projected])
        assert torch.allclose(projected, record.x, atol=1e-14)


def test_inputs_are_never_changed() -> None:
    problem = ridge_hpo()
    x, y = problem.x0.clone().requires_grad_(), problem.y0.clone()
    for name in methods.names():
        methods.run(name, problem_of(problem), x, y, iterations=1).__next__()
    assert torch.equal(x.detach(), problem.x0) and torch.equal(y, problem.y0) and x.grad is None


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_dtypes_stay_what_they_were(name: str) -> None:
    """Low precision, and tensors of several dtypes in one level."""
    options: dict[str, Any] = {} if name == "d-tfbo" else {"lower_steps": 2}
    problem = methods.BilevelProblem(
        upper_loss=lambda x, y, _: (y["a"] - 1).square().sum() + y["b"].float().square().sum(),
        lower_loss=lambda x, y, _: (y["a"] - x).square().sum() + (y["b"].float() - x.float()).square().sum(),
    )
    for one, other in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        x, y = torch.zeros(2, dtype=one), {"a": torch.zeros(2, dtype=one), "b": torch.ones(2, dtype=other)}
        *_, record = methods.run(name, problem, x, y, iterations=2, **options)
        assert (record.x.dtype, record.y["a"].dtype, record.y["b"].dtype) == (one, one, other)
        assert all(bool(t.isfinite().all()) for t in (record.x, record.y["a"], record.y["b"]))


def test_records_are_those_of_the_iteration() -> None:
    problem = ridge_hpo()
    records = run("stocbio", problem, 4, lower_steps=3, solver=Neumann(2, 0.1))
    y, x = problem.y0, problem.x0
    for k, record in enumerate(records):
        for _ in range(3):
            lower = float(problem.g(x, y))
            y = y - 0.1 * problem.gradient_y(x, y)
        assert record.iteration == k
        assert record.losses.upper == pytest.approx(float(problem.f(x, y)))
        assert record.losses.lower == pytest.approx(lower)
        assert record.steps == (0.1, 0.1) and len(record.records["y"]) == 3
        assert torch.allclose(record.y, y) and torch.allclose(record.x, x - 0.1 * record.hypergradient)
        assert record.total_cost == pytest.approx((k + 1) * (1 + 3 + 2 * 2.2 + 1))
        assert str(record).startswith(f"iteration {k}: f ")
        x = record.x


class Faulty:
    """A problem whose losses return NaN at one call."""

    def __init__(self, at: int) -> None:
        self.problem, self.at, self.calls = ridge_hpo(), at, 0

    def spoil(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * math.nan if self.calls - 1 == self.at else loss

    def made(self) -> methods.BilevelProblem:
        return methods.BilevelProblem(
            upper_loss=lambda x, y, _: self.spoil(self.problem.f(x, y)),
            lower_loss=lambda x, y, _: self.spoil(self.problem.g(x, y)),
        )


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_a_number_that_is_not_finite_moves_nothing_to_where_it_is_not(name: str) -> None:
    options: dict[str, Any] = {"lower_steps": 2} if name != "d-tfbo" else {"lower_steps": 5, "auxiliary_steps": 5}
    for at in range(0, 12, 2):
        faulty = Faulty(at)
        x, y = faulty.problem.x0, faulty.problem.y0
        records = list(methods.run(name, faulty.made(), x, y, iterations=3, **options))
        assert finite(records), at
        assert all(bool(torch.isfinite(v).all()) for r in records for v in r.auxiliary.values()), at
        assert not torch.equal(records[-1].y, y) or rows.ROWS[name].start.get("y") == "first"


def test_too_many_in_a_row_raise() -> None:
    problem = methods.BilevelProblem(lambda x, y, _: (x * math.nan).sum(), lambda x, y, _: (y - x).square().sum())
    stream = methods.run("soba", problem, torch.ones(2), torch.zeros(2), iterations=50, max_skips=5)
    with pytest.raises(NonFiniteError, match="5 iterations in a row"):
        list(stream)


def test_a_loss_below_its_bound_is_said_once() -> None:
    problem = methods.BilevelProblem(lambda x, y, _: y.square().sum(), lambda x, y, _: (y - x).square().sum() - 50)
    with pytest.warns(AdaptiveBilevelWarning, match="below lower_bound") as caught:
        options: dict[str, Any] = {"iterations": 3, "lower_step": policies.SPSB()}
        list(methods.run("bisls-sgd", problem, torch.ones(2), torch.zeros(2), **options))
    assert sum("below lower_bound" in str(w.message) for w in caught) == 1
    assert caught[0].filename == __file__


def test_a_cap_that_was_reached_is_said_once() -> None:
    with pytest.warns(AdaptiveBilevelWarning, match="lower_steps") as caught:
        run("d-tfbo", b2(), 4, lower_steps=1, auxiliary_steps=1, tolerance=1e-12)
    assert len(caught) == 1 and "tests" in caught[0].filename
