"""Conjugate gradients where H is indefinite or singular: an iterate that is not too long, and a status that says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from adaptive_bilevel.hypergradient import CG, SolverStatus
from adaptive_bilevel.hypergradient.cg import Adjoint
from tests.hypergradient.test_solvers import SEEDS, Matrix, solve


def rotated(spectrum: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix with this spectrum, the pseudo-inverse of its absolute value, and a right side with all eigenvectors."""
    rng, size = torch.Generator().manual_seed(seed), len(spectrum)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
    inverse = torch.where(spectrum == 0, 0.0, 1 / spectrum.abs())
    return Q * spectrum @ Q.T, Q * inverse @ Q.T, Q @ torch.randn(size, generator=rng, dtype=torch.float64)


NOT_DEFINITE = {
    "network": torch.cat([torch.linspace(-0.3, -0.01, 8), torch.linspace(0.01, 0.3, 40), torch.tensor([1.0, 2, 5])]),
    "wide": torch.linspace(-2, 5, 51),
    "one small negative": torch.cat([torch.tensor([-0.05]), torch.logspace(-3, 0, 50)]),
    "singular": torch.cat([torch.zeros(18), torch.linspace(0.04, 3.2, 33)]),
}


@pytest.mark.parametrize("name", NOT_DEFINITE)
def test_cg_is_never_longer_than_the_inverse_of_the_absolute_value(name):
    lengths = []
    for seed in range(20):
        H, inverse, b = rotated(NOT_DEFINITE[name].double(), seed)
        adjoint = Adjoint((b,))
        solution = CG(20, 1e-3).solve(Matrix(H), (b,), adjoint=adjoint)
        assert solution.status in (SolverStatus.negative_curvature, SolverStatus.vanishing_curvature)
        v = solution.tensors[0]
        assert solution.residual == pytest.approx(float((b - H @ v).norm() / b.norm()), rel=1e-6)
        torch.testing.assert_close(adjoint.tensors[0], v, rtol=1e-6, atol=1e-9)  # P of the directions that v is made of
        lengths.append(float(v.norm() / (inverse @ b).norm()))
    assert max(lengths) <= 1.5


@pytest.mark.parametrize("rows", [16, 64])
def test_cg_on_a_sample_with_fewer_rows_than_columns_stays_out_of_the_null_space(rows):
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        A = torch.randn(rows, 100, generator=rng, dtype=torch.float64)
        H, b = A.T @ A / rows, torch.randn(100, generator=rng, dtype=torch.float64)
        v, solution = solve(CG(), H, b)
        assert solution.status is SolverStatus.vanishing_curvature and "singular" in solution.status.sentence
        inverse = torch.linalg.pinv(H, rtol=1e-9)
        bound = torch.linalg.matrix_norm(inverse, 2) * b.norm()
        assert (inverse @ b).norm() / 5 <= v.norm() <= 10 * bound  # to the limit of 20 iterations: 1e4 to 1e6


def test_cg_does_not_blow_up_on_a_small_singular_matrix():
    H, _, b = rotated(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64), 0)
    v, solution = solve(CG(50, 1e-12), H, b)
    assert solution.status is SolverStatus.vanishing_curvature
    assert v.norm() < 10 * b.norm()  # the next step would have been of size 1e15


@given(SEEDS)
def test_cg_takes_flat_directions_that_it_resolves(seed):
    H, _, b = rotated(torch.logspace(-2, 0, 60, dtype=torch.float64), seed)  # 1 / 100 is resolved by 20 iterations
    v, solution = solve(CG(20, 1e-9), H, b)
    assert solution.status is SolverStatus.iteration_limit
    energy = v @ H @ v / 2 - b @ v
    assert float(energy) <= 0.8 * -float(b @ torch.linalg.solve(H, b)) / 2
