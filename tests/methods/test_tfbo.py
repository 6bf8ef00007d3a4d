"""S-TFBO and D-TFBO on b2, against values of the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from adaptive_bilevel import methods, policies
from tests.methods.helpers import problem_of, run
from tests.problems import b2


def tfbo(name: str, iterations: int, initial: float) -> list[float]:
    """||grad F(x_k)||, k = 0..iterations, from x = (3, -2), y = v = 0."""
    problem, single = b2(), name == "s-tfbo"
    x0 = torch.tensor([3.0, -2.0])
    constant = problem.dF(torch.zeros(2))
    J = torch.stack([problem.dF(e) - constant for e in torch.eye(2)], dim=1)
    records = methods.run(
        name,
        problem_of(problem),
        x0,
        torch.zeros(3),
        iterations=iterations,
        upper_step=policies.GradientNorm(initial=initial, coupling="product" if single else "none"),
        lower_step=policies.GradientNorm(initial=initial),
        auxiliary_step=policies.GradientNorm(initial=initial, coupling="max" if single else "none"),
    )
    return [float((constant + J @ x).norm()) for x in (x0, *(record.x for record in records))]


def squares(norms: list[float], T: int) -> float:
    """(1/T) sum_{t<T} ||grad F(x_t)||^2."""
    return sum(n * n for n in norms[:T]) / T


def test_d_tfbo_on_b2() -> None:
    """Values of the reference. Over T = 10..3000 their slope is -.98 (-.95 over the three here)."""
    means = {T: squares(tfbo("d-tfbo", T, 1.0), T) for T in (10, 30, 60)}
    expected = {10: 221.5976595881761, 30: 77.85762450561678, 60: 40.21853400314862}
    assert means == pytest.approx(expected, rel=1e-9)
    slope = math.log(means[60] / means[10]) / math.log(6)
    assert slope == pytest.approx(-0.95, abs=0.01)


def test_s_tfbo_on_b2() -> None:
    """Values of the reference. Over T = 10..3000 their slope is -.42, steepening; ||grad F|| at 2000 is 3.95."""
    norms = tfbo("s-tfbo", 300, 1.0)
    expected = {10: 944.6636670431915, 30: 772.0521827154503, 100: 571.586175835268, 300: 385.9588106620679}
    assert {T: squares(norms, T) for T in expected} == pytest.approx(expected, rel=1e-9)
    assert norms[300] == pytest.approx(14.808740564394146, rel=1e-9)


def test_accumulators_only_grow_and_the_stop_is_kept() -> None:
    problem = b2()
    for record in run("d-tfbo", problem, 20):
        for name in "yv":
            steps = [r.step_size for r in record.records[name]]
            assert all(a >= b for a, b in itertools.pairwise(steps))
    upper = [record.steps.upper for record in run("s-tfbo", problem, 30)]
    assert all(a >= b for a, b in itertools.pairwise(upper))
