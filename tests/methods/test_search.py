"""The upper search of a row: the optimizer of the same name, bit for bit, and its decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, OneStepBiSLS, policies
from adaptive_bilevel.hypergradient import CG
from tests.bilevel.helpers import iterate
from tests.methods.helpers import run
from tests.problems import random_qb


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize("response", ["tangent", "step"])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("start", [None, 3.0])
def test_bisls_is_the_optimizer_of_the_same_name(direction: str, response: str, start: float | None) -> None:
    """Bit for bit, the choice about the carried y included."""
    problem, steps, solver = random_qb(4), 2, CG(8, 0.01)
    point = problem.instance()
    inner = SLS([point.y], 10.0, lower_bound=None)
    outer: Any = BiSLS([point.x], start, c=0.3, lower=inner, direction=direction, solver=solver)
    if response == "step":
        outer = OneStepBiSLS([point.x], start, c=0.3, lower=inner, direction=direction)
    records = run(
        f"bisls-{direction}",
        problem,
        12,
        solver=solver,
        response=response,
        lower_steps=steps,
        lower_step=policies.SLS(start=10.0, lower_bound=None),
        upper_step=policies.SLS(start=start, c=0.3),
    )
    for record in records:
        expected = iterate(inner, outer, point, steps, solver)
        (upper,) = record.records["x"]
        assert upper[:6] == expected[:6]
        assert torch.equal(record.x, point.x.detach())


def test_slsb_at_the_upper_level_decays() -> None:
    problem, bound = random_qb(2), 0.02
    options = {"lower_step": policies.SLS(start=1.0, lower_bound=None), "upper_step": policies.SLSB(bound=bound)}
    for record in run("bisls-sgd", problem, 6, **options):
        assert 0.0 < record.steps.upper <= bound * (record.iteration + 1) ** -0.5 + 1e-15
