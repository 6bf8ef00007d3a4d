"""Linear solvers against dense linear algebra, and their behaviour at the edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG, Identity, Neumann, SolverStatus

SEEDS = st.integers(0, 10_000)


def spd(seed: int, size: int = 6, least: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    M = torch.randn(size, size, generator=rng, dtype=torch.float64)
    return M @ M.T / size + least * torch.eye(size, dtype=torch.float64), torch.randn(size, generator=rng)


class Matrix:
    """A matrix acting on vectors cut into pieces of the given sizes; counts its products."""

    def __init__(self, H: torch.Tensor, sizes: tuple[int, ...] | None = None) -> None:
        self.H, self.sizes, self.count = H, sizes or (len(H),), 0

    def __call__(self, pieces):
        self.count += 1
        return (self.H @ torch.cat(list(pieces))).split(self.sizes)

    def cut(self, vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return vector.split(self.sizes)


def solve(solver, H, b, initial=None):
    solution = solver.solve(lambda v: (H @ v[0],), (b,), None if initial is None else (initial,))
    return solution.tensors[0], solution


def test_cg_is_exact_after_as_many_iterations_as_dimensions():
    H, b = spd(0)
    v, solution = solve(CG(6, 1e-13), H, b)
    torch.testing.assert_close(v, torch.linalg.solve(H, b), rtol=1e-9, atol=1e-12)
    assert solution.iterations == 6


@given(SEEDS, st.integers(1, 6))
def test_cg_error_bound(seed, iterations):
    H, b = spd(seed)
    exact = torch.linalg.solve(H, b)
    v, _ = solve(CG(iterations, 0.0), H, b)
    eigenvalues = torch.linalg.eigvalsh(H)
    root = math.sqrt(eigenvalues[-1] / eigenvalues[0])

    def energy(e):
        return math.sqrt(max(float(e @ H @ e), 0.0))

    assert energy(v - exact) <= 2 * ((root - 1) / (root + 1)) ** iterations * energy(exact) * (1 + 1e-9) + 1e-12


@given(SEEDS, st.sampled_from([0.5, 0.1, 1e-3, 1e-8]))
def test_cg_meets_the_relative_tolerance(seed, tolerance):
    H, b = spd(seed)
    b = 1e-3 * b
    v, solution = solve(CG(50, tolerance), H, b)
    residual = float((b - H @ v).norm() / b.norm())
    assert solution.status is SolverStatus.converged
    assert residual <= tolerance * (1 + 1e-6)
    assert solution.residual == pytest.approx(residual, abs=1e-10)
    if solution.iterations > 1:  # and stops as soon as it does
        before, _ = solve(CG(solution.iterations - 1, 0.0), H, b)
        assert float((b - H @ before).norm() / b.norm()) > tolerance * (1 - 1e-6)


def test_cg_says_that_the_limit_came_first():
    H, b = spd(1)
    v, solution = solve(CG(2, 1e-12), H, b)
    assert (solution.status, solution.iterations) == (SolverStatus.iteration_limit, 2)
    assert solution.residual == pytest.approx(float((b - H @ v).norm() / b.norm()))


def test_cg_stops_at_zero_curvature_with_the_iterate_so_far():
    H, b = torch.diag(torch.tensor([2.0, -1.0])), torch.tensor([1.0, 0.1])
    v, solution = solve(CG(10, 1e-10), H, b)
    assert solution.status is SolverStatus.negative_curvature
    assert solution.iterations == 2
    torch.testing.assert_close(v, solve(CG(1, 0.0), H, b)[0])


def test_cg_with_negative_curvature_at_once_returns_its_start():
    H, b = -torch.eye(2), torch.ones(2)
    v, solution = solve(CG(), H, b)
    assert torch.equal(v, torch.zeros(2))
    assert (solution.status, solution.iterations) == (SolverStatus.negative_curvature, 1)


@pytest.mark.parametrize("size", [3, 12])
def test_cg_without_any_curvature(size):
    solution = CG().solve(lambda v: (0 * v[0],), (torch.ones(size),))
    assert (solution.status, solution.iterations) == (SolverStatus.flat, 1)
    assert not solution.tensors[0].any()


def test_cg_goes_on_after_convergence_without_dividing_by_zero():
    H, b = torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
    v, solution = solve(CG(50, 0.0), H, b)
    assert torch.equal(v, b)
    assert (solution.status, solution.iterations, solution.residual) == (SolverStatus.converged, 1, 0.0)


def test_cg_in_float32_stops_at_its_rounding():
    H, b = spd(2)
    v, solution = solve(CG(200, 0.0), H.float(), b.float())
    assert solution.status is SolverStatus.converged
    torch.testing.assert_close(v.double(), torch.linalg.solve(H, b), rtol=1e-3, atol=1e-4)


@given(SEEDS)
def test_cg_warm_start_is_never_worse_than_cold(seed):
    H, b = spd(seed)
    near = torch.linalg.solve(H, b) + 1e-3 * spd(seed + 1)[1]
    cold, warm = solve(CG(50, 1e-2), H, b)[1], solve(CG(50, 1e-2), H, b, near)[1]
    assert warm.status is SolverStatus.converged
    assert warm.iterations <= cold.iterations + 1  # the product with the start
    bad, _ = solve(CG(50, 1e-2), H, b, -100 * near)
    assert torch.equal(bad, solve(CG(50, 1e-2), H, b)[0])  # dropped


def test_cg_solves_further_from_a_solution():
    H, b = spd(3, size=20, least=0.01)
    solver = CG(50, 0.1)
    first = solve(solver, H, b)[1]
    further = solver.solve(
        lambda v: (H @ v[0],), (b,), first.tensors
    )  # nothing to do: one product to see that the tolerance is met
    assert further.iterations == 1
    assert further.tensors[0].data_ptr() != first.tensors[0].data_ptr()
    torch.testing.assert_close(further.tensors, first.tensors, rtol=0, atol=0)
    finer = dataclasses.replace(solver, tolerance=solver.tolerance / 10)
    further = finer.solve(lambda v: (H @ v[0],), (b,), first.tensors)
    assert further.residual <= 0.01 < first.residual


@given(SEEDS, st.integers(0, 12))
def test_neumann_is_its_formula(seed, steps):
    H, b = spd(seed)
    scale = 1 / float(torch.linalg.eigvalsh(H)[-1])
    v, solution = solve(Neumann(steps, scale), H, b)
    factor = torch.eye(6) - scale * H
    expected = scale * sum(torch.linalg.matrix_power(factor, q) @ b for q in range(steps + 1))
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)
    assert (solution.status, solution.iterations) == (SolverStatus.complete, steps)
    assert solution.residual >= float((b - H @ v).norm() / b.norm()) * (1 - 1e-9)


def test_neumann_continues_from_a_start():
    H, b = spd(4)
    scale = 0.9 / float(torch.linalg.eigvalsh(H)[-1])
    half, _ = solve(Neumann(3, scale), H, b)
    whole, solution = solve(Neumann(3, scale), H, b, half)
    torch.testing.assert_close(whole, solve(Neumann(7, scale), H, b)[0])
    assert solution.iterations == 4


@pytest.mark.parametrize("random", [False, True])
def test_neumann_stops_when_it_grows(random):
    H, b = torch.diag(torch.tensor([1.0, 5.0])), torch.tensor([1.0, 1e-2])
    generator = torch.Generator().manual_seed(0)
    v, solution = solve(Neumann(400, 0.5, random, generator), H, b)
    assert solution.status is SolverStatus.diverging
    assert solution.iterations < 20
    assert v.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_neumann_does_not_take_rounding_for_growth(scale):
    H, b = torch.diag(torch.tensor([1.0, 4.0])) if scale < 1 else torch.eye(2), torch.ones(2)
    v, solution = solve(Neumann(300, scale), H.float(), b.float())
    assert solution.status is SolverStatus.complete
    torch.testing.assert_close(v.double(), torch.linalg.solve(H, b), rtol=1e-5, atol=0)


def test_random_neumann_in_expectation_is_the_sum():
    H, b = spd(5)
    scale, N = 0.9 / float(torch.linalg.eigvalsh(H)[-1]), 4
    draws = {}
    for seed in range(60):
        solver = Neumann(N, scale, random=True, generator=torch.Generator().manual_seed(seed))
        v, solution = solve(solver, H, b)
        draws[solution.iterations] = v
        assert math.isnan(solution.residual)
    assert sorted(draws) == list(range(N))  # every value of 0..N-1, and no other
    mean = torch.stack([draws[n] for n in range(N)]).mean(0)
    torch.testing.assert_close(mean, solve(Neumann(N - 1, scale), H, b)[0], rtol=1e-12, atol=1e-12)


def test_random_neumann_draws_from_its_generator_only():
    H, b = spd(6)
    state = torch.get_rng_state()
    first = solve(Neumann(9, 0.1, True, torch.Generator().manual_seed(3)), H, b)[0]
    again = solve(Neumann(9, 0.1, True, torch.Generator().manual_seed(3)), H, b)[0]
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_identity_takes_no_product():
    b = torch.tensor([1.0, -2.0])
    solution = Identity(0.5).solve(lambda v: pytest.fail("a product was taken"), (b,))
    torch.testing.assert_close(solution.tensors, (0.5 * b,))
    assert (solution.iterations, solution.status) == (0, SolverStatus.complete)


SOLVERS = [CG(), Neumann(3, 0.1), Neumann(3, 0.1, random=True), Identity(2.0)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_right_side(solver):
    solution = solver.solve(lambda v: pytest.fail("a product was taken"), (torch.zeros(2), torch.zeros(3, 1)))
    assert solution.status is SolverStatus.zero_rhs
    assert (solution.iterations, solution.residual) == (0, 0.0)
    assert [tuple(t.shape) for t in solution.tensors] == [(2,), (3, 1)]
    assert not any(t.any() for t in solution.tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_right_side_that_is_not_finite_passes_through(solver, value):
    b = torch.tensor([1.0, value])
    solution = solver.solve(lambda v: pytest.fail("a product was taken"), (b,))
    assert solution.status is SolverStatus.non_finite
    torch.testing.assert_close(solution.tensors, (b,), equal_nan=True)


@pytest.mark.parametrize("solver", [CG(), Neumann(3, 0.1)], ids=repr)
def test_product_that_is_not_finite_ends_the_solve(solver):
    solution = solver.solve(lambda v: (v[0] * math.nan,), (torch.ones(2),))
    assert solution.status is SolverStatus.non_finite
    assert solution.iterations == 1
    assert solution.tensors[0].isfinite().all()


@pytest.mark.parametrize("solver", [CG(4, 1e-6), Neumann(5, 0.1), Identity(0.3)], ids=repr)
def test_pieces_are_one_vector(solver):
    H, b = spd(7)
    whole, cut = Matrix(H), Matrix(H, (1, 3, 2))
    one, many = solver.solve(whole, whole.cut(b)), solver.solve(cut, cut.cut(b))
    torch.testing.assert_close(torch.cat(many.tensors), one.tensors[0], rtol=1e-12, atol=1e-12)
    assert many.iterations == one.iterations == whole.count == cut.count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    # 4096 ones: a sum in bfloat16 stops at 256, one in float16 at 2048.
    b = torch.ones(4096, dtype=dtype)
    solution = CG(5, 1e-3).solve(lambda v: (2 * v[0],), (b,))
    assert solution.status is SolverStatus.converged
    assert solution.tensors[0].dtype is dtype
    torch.testing.assert_close(solution.tensors[0], 0.5 * b)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_inputs_are_left_alone(solver):
    H, b = spd(8)
    start, kept = torch.randn(6), b.clone()
    solution = solver.solve(lambda v: (H @ v[0],), (b,), (start,))
    assert torch.equal(b, kept)
    assert all(t.data_ptr() not in (b.data_ptr(), start.data_ptr()) for t in solution.tensors)
    assert not any(t.requires_grad for t in solution.tensors)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CG(max_iterations=0), "CG(max_iterations=0)"),
        (lambda: CG(max_iterations=2.5), "CG(max_iterations=2.5)"),  # type: ignore[arg-type]
        (lambda: CG(tolerance=-0.1), "CG(tolerance=-0.1)"),
        (lambda: CG(tolerance=1.0), "CG(tolerance=1.0)"),
        (lambda: CG(tolerance=math.nan), "CG(tolerance=nan)"),
        (lambda: Neumann(-1, 0.1), "Neumann(steps=-1)"),
        (lambda: Neumann(0, 0.1, random=True), "Neumann(steps=0)"),
        (lambda: Neumann(3, 0.0), "Neumann(scale=0.0)"),
        (lambda: Neumann(3, math.inf), "Neumann(scale=inf)"),
        (lambda: Neumann(3, 0.1, generator=7), "Neumann(generator=7)"),  # type: ignore[arg-type]
        (lambda: Identity(-1.0), "Identity(scale=-1.0)"),
    ],
)
def test_wrong_options_are_named(build, words):
    with pytest.raises(OptionError) as caught:
        build()
    assert isinstance(caught.value, ValueError)
    assert words in str(caught.value)


def test_solvers_are_frozen_values():
    assert CG() == CG(20, 0.1, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CG().tolerance = 0.5  # type: ignore[misc]


def test_each_status_has_a_sentence():
    assert len({status.sentence for status in SolverStatus}) == len(SolverStatus)
