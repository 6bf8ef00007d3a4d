"""The random bilevel problems of the benchmark, a part of them."""

from __future__ import annotations

import warnings

import pytest
import torch

import fuzz
import fuzz_problems


@pytest.fixture(scope="module")
def runs() -> list[fuzz.Run]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [fuzz.run(seed) for seed in range(20)]


def test_nothing_diverges_fails_or_raises(runs: list[fuzz.Run]) -> None:
    found = fuzz.summary(runs)
    assert found["problems"] == 20
    assert (found["diverged"], found["errors"], found["upper_searches_failed_unexplained"]) == ([], [], [])
    assert len(found["stalls"]) <= 1
    assert {run.family for run in runs} == set(fuzz_problems.FAMILIES)


@pytest.mark.parametrize("family", ["convex", "singular", "nonconvex"])
def test_the_known_solution_has_no_lower_gradient(family: str) -> None:
    problem = fuzz_problems.make(fuzz_problems.FAMILIES.index(family))
    u = torch.ones(problem.cross.shape[1], dtype=torch.float64)
    y = (problem.solution(u) * problem.scales["y"]).requires_grad_()
    (g,) = torch.autograd.grad(problem.lower(u * problem.scales["x"], y) / problem.scales["g"] * problem.scales["y"], y)
    assert g.norm() < 1e-9
