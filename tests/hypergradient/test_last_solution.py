"""The last solution as the next start: what it saves, how long it is kept, and one that is given."""

from __future__ import annotations

import gc

import torch

from adaptive_bilevel.hypergradient import CG, implicit, implicit_with_info
from tests import problems


def test_warm_start_in_a_loop():
    problem = problems.random_qb(0, mu=0.01, dy=20)
    at = problem.instance()
    counts = {False: 0, True: 0}
    for warm in counts:
        for k in range(5):
            with torch.no_grad():
                at.x.copy_(problem.x0 + 1e-4 * k)
            solver = CG(50, 1e-3, warm_start=warm)  # a new object each time: the state is not in it
            _, info = implicit_with_info(at.upper, at.lower, [at.x], [at.y], solver)
            counts[warm] += info.hvps
            assert info.solution.residual <= 1e-3
    assert counts[True] < 0.6 * counts[False]


def test_warm_start_dies_with_the_lower_tensors():
    from adaptive_bilevel.hypergradient import last_solution

    at = problems.b2().instance()
    implicit(at.upper, at.lower, [at.x], [at.y], CG(warm_start=True))
    before = len(last_solution._solutions)
    assert last_solution.recall([at.y]) is not None
    assert last_solution.recall([at.y, at.x]) is None  # does not fit
    del at
    gc.collect()
    assert len(last_solution._solutions) == before - 1


def test_a_given_start_resumes_bitwise():
    at = problems.b2().instance()
    solver = CG(2, 0.0, warm_start=True)
    _, first = implicit_with_info(at.upper, at.lower, [at.x], [at.y], solver)
    (second,) = implicit(at.upper, at.lower, [at.x], [at.y], solver)
    other = problems.b2().instance()
    (resumed,) = implicit(other.upper, other.lower, [other.x], [other.y], solver, initial=first.solution.tensors)
    assert torch.equal(second, resumed)
