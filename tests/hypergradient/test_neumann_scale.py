"""The scale that `Neumann` finds for itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import CG, Neumann, SolverStatus, assign, implicit, implicit_with_info
from tests.hypergradient.test_not_definite import rotated
from tests.hypergradient.test_solvers import SEEDS, Matrix
from tests.problems import b2

SPECTRA = {
    "clustered": torch.linspace(0.5, 1.0, 40),
    "decades": torch.logspace(-3, 0, 40),
    "large": 1e6 * torch.linspace(0.01, 1.0, 40),
    "one large": torch.cat([torch.full((39,), 0.1), torch.tensor([10.0])]),
    "two entries": torch.tensor([1.0, 3.0]),
    "one entry": torch.tensor([7.0]),
}


@given(st.sampled_from(sorted(SPECTRA)), SEEDS, st.integers(0, 12))
def test_the_bias_falls_as_with_one_over_the_largest_eigenvalue(name: str, seed: int, steps: int) -> None:
    H, inverse, b = rotated(SPECTRA[name].double(), seed)
    product = Matrix(H)
    solution = Neumann(steps).solve(product, (b,))
    assert solution.status is SolverStatus.complete
    assert solution.iterations == product.count == steps + min(3, len(b) if name != "one large" else 2)
    mu, largest = float(SPECTRA[name].min()), float(SPECTRA[name].max())
    error = float((solution.tensors[0] - inverse @ b).norm() / (inverse @ b).norm())
    assert error <= (1 - mu / (1.5 * largest)) ** (steps + 1) * (1 + 1e-6)


@given(SEEDS)
def test_it_is_the_series_with_that_scale(seed: int) -> None:
    H, _, b = rotated(SPECTRA["decades"].double(), seed)
    probed = Neumann(5).scaled(Matrix(H), (b,))
    assert probed.scale is not None and 0.6 <= probed.scale <= 1.6 and probed.products == 3
    found, given_scale = (s.solve(Matrix(H), (b,)).tensors[0] for s in (Neumann(5), Neumann(5, probed.scale)))
    assert torch.equal(found, given_scale)


@pytest.mark.parametrize("random", [False, True])
def test_edges(random: bool) -> None:
    solver, ones = Neumann(3, random=random), (torch.ones(4),)
    flat = solver.solve(lambda v: (0 * v[0],), ones)
    assert (flat.status, flat.iterations) == (SolverStatus.flat, 1) and not flat.tensors[0].any()
    for value in (math.nan, math.inf):
        wrong = solver.solve(Matrix(value * torch.eye(4)), ones)
        assert wrong.status is SolverStatus.non_finite and not wrong.tensors[0].any()


def test_one_scale_serves_hypergradient_and_response() -> None:
    x, y, upper, lower = b2().instance()
    inner = SLS([y], 0.1, lower_bound=None)
    outer = BiSLS([x], 1.0, lower=inner, solver=Neumann(4))
    for _ in range(4):
        inner.step(lower)
        h, info = implicit_with_info(upper, lower, [x], [y], Neumann(4))
        assign([x], h)
        before = outer.evaluations.lower.hvps
        outer.step(upper)
        assert outer.record is not None and outer.record.slope_ratio == pytest.approx(1.0, rel=1e-9)
        assert info.hvps == outer.evaluations.lower.hvps - before == 4 + min(3, y.numel())


def test_more_terms_are_nearer_to_the_exact_hypergradient() -> None:
    x, y, upper, lower = b2().instance()
    exact = implicit(upper, lower, [x], [y], CG(100, 1e-12))[0]
    errors = [float((implicit(upper, lower, [x], [y], Neumann(n))[0] - exact).norm()) for n in (1, 10, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * float(exact.norm())


@pytest.mark.parametrize("scale", ["Auto", None, 0.0, math.nan])
def test_other_words_are_refused(scale: object) -> None:
    with pytest.raises(ValueError, match=r"Neumann\(scale="):
        Neumann(3, scale)  # type: ignore[arg-type]
