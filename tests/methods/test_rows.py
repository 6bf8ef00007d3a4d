"""What the rows are: their names, their fixed points, and that each is a composition."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import methods
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.methods import rows
from tests.methods.helpers import EXACT, run
from tests.problems import Problem, b2


def optimum(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(x*, y*, v*) of a quadratic."""
    zero = problem.dF(torch.zeros_like(problem.x0))
    columns = [problem.dF(e) - zero for e in torch.eye(problem.x0.numel())]
    x = torch.linalg.solve(torch.stack(columns, dim=1), -zero)
    y = problem.ystar(x)
    return x, y, torch.linalg.solve(problem.hessian(x, y), torch.func.grad(problem.f, argnums=1)(x, y))


STATIONARY = [
    *("ba", "aid-bio", "sustain", "mrbo", "vrbo", "stable", "fsla", "soba", "saba", "srba", "amigo", "s-tfbo", "d-tfbo")
]


@pytest.mark.parametrize("name", STATIONARY)
def test_the_solution_is_a_fixed_point(name: str) -> None:
    x, y, v = optimum(b2())
    options: dict[str, Any] = {"v": v} if "v" in rows.ROWS[name].variables else {"estimator": EXACT}
    for record in run(name, b2(), 5, x=x, y=y, **options):
        assert float((record.x - x).norm() + (record.y - y).norm()) < 1e-13


@pytest.mark.parametrize(("multiplier", "bound"), [(10.0, 0.1), (100.0, 0.012), (1000.0, 0.0012)])
def test_the_value_function_moves_it_by_one_over_lambda(multiplier: float, bound: float) -> None:
    x, y, _ = optimum(b2())
    rule = methods.Growth(initial=multiplier, increment=0.0)
    step = 0.4 / multiplier / 4.0
    options: dict[str, Any] = {"lower_step": step, "auxiliary_step": 0.2, "upper_step": 1e-9}
    *_, record = run("f2sa", b2(), 1, x=x, y=y, lower_steps=400, multiplier=rule, **options)
    assert bound / 4 < float(record.hypergradient.norm()) < bound
    assert not torch.equal(record.x, x)


def test_the_error_of_stable_contracts_as_if_x_stood_still() -> None:
    problem, b = b2(), 0.2
    H = problem.hessian(problem.x0, problem.y0)
    error = problem.y0 - problem.ystar(problem.x0)
    for record in run("stable", problem, 6, lower_step=b, upper_step=0.05):
        error = error - b * H @ error
        assert torch.allclose(record.y - problem.ystar(record.x), error, atol=1e-12)


def test_bome_without_a_gap_does_not_divide_by_zero() -> None:
    problem = b2()
    solution = problem.ystar(problem.x0)
    record, *_ = run("bome", problem, 1, y=solution)
    assert math.isfinite(record.multiplier)


def test_names_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    listed = methods.names()
    expected = (
        "ba bsa aid-bio stocbio alset ttsa stable sustain mrbo vrbo fsla soba saba srba amigo pzobo hozog unroll "
        "unroll-forward unroll-truncated darts s-tfbo d-tfbo bisps bisls-sgd bisls-adam f2sa pgdo bome primal-dual"
    )
    assert set(listed) == set(expected.split())
    lines = str(listed).splitlines()
    assert len(lines) == len(listed)
    for name, line in zip(listed, lines, strict=True):
        assert line.startswith(name) and rows.ROWS[name].source in line
        text = methods.describe(name)
        assert capsys.readouterr().out.strip() == text.strip()
        for word in (rows.ROWS[name].summary, "estimator", "g: ", "assumes", "iteration"):
            assert word in text
    with pytest.raises(OptionError, match="did you mean stocbio"):
        methods.describe("stocBiO")


def test_a_row_is_short_and_has_no_loop() -> None:
    """At most 15 lines, all of them a composition."""
    lengths = {}
    for family in pathlib.Path(rows.__file__).parent.glob("*.py"):
        source = family.read_text().splitlines()
        for start in (i for i, line in enumerate(source) if line == "    Row("):
            lengths[source[start + 1]] = source[start:].index("    ),") - 1
        if family.name != "__init__.py":
            assert not any(line.lstrip().startswith(("for ", "while ")) for line in source)
    assert len(lengths) == len(methods.names())
    assert max(lengths.values()) <= 15, lengths
