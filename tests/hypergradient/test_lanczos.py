"""Lanczos against dense eigendecompositions, and its behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import CG, SolverStatus
from adaptive_bilevel.hypergradient.krylov import Layout, Rows
from adaptive_bilevel.hypergradient.lanczos import Lanczos
from adaptive_bilevel.hypergradient.spectral_inverse import SpectralInverse

SEEDS = st.integers(0, 10_000)
SIZE = 24

SPECTRA = {
    "definite": torch.linspace(0.5, 3.0, SIZE),
    "ill-conditioned": torch.logspace(-6, 1, SIZE),
    "indefinite": torch.linspace(-2.0, 5.0, SIZE),
    "negative": -torch.linspace(0.1, 1.0, SIZE),
    "singular": torch.cat([torch.zeros(SIZE // 2), torch.linspace(1.0, 2.0, SIZE // 2)]),
    "one negative": torch.cat([torch.tensor([-1e-3]), torch.linspace(0.1, 2.0, SIZE - 1)]),
    "huge": 1e8 * torch.linspace(-1.0, 5.0, SIZE),
    "tiny": 1e-8 * torch.linspace(-1.0, 5.0, SIZE),
    "three values": torch.tensor([0.25, 1.0, 4.0]).repeat(SIZE // 3),
}


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=rng, dtype=torch.float64))
    H = Q * spectrum.double() @ Q.T
    return (H + H.T) / 2


def vector(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Product:
    """The product with a matrix, counted; vectors are cut into pieces of two shapes."""

    def __init__(self, H: Tensor) -> None:
        self.H, self.count = H, 0

    def __call__(self, pieces):
        self.count += 1
        return self.cut(self.H @ torch.cat([p.reshape(-1) for p in pieces]))

    def cut(self, flat: Tensor) -> tuple[Tensor, ...]:
        head = flat[:4] if len(flat) > 4 else flat[:0]
        return head.reshape(2, -1) if len(head) else head.reshape(0, 2), flat[len(head) :]


def joined(pieces) -> Tensor:
    return torch.cat([p.reshape(-1) for p in pieces])


def dense(inverse: SpectralInverse, product: Product) -> Tensor:
    """P as a matrix."""
    V = torch.stack([torch.cat(inverse._rows.row(i)) for i in range(inverse._rows.count)], dim=1)
    identity = torch.eye(len(V), dtype=V.dtype)
    return V @ inverse._inverse @ V.T + inverse.outside * (identity - V @ V.T)


def reference(H: Tensor, b: Tensor, k: int, c: float) -> Tensor:
    """P of the module's docstring, with the Krylov space from a QR decomposition."""
    v, basis = b / b.norm(), []
    for _ in range(k):
        basis.append(v)
        V = torch.stack(basis, dim=1)
        v = H @ v
        for _ in range(3):
            v = v - V @ (V.T @ v)
        v = v / v.norm()
    t, S = torch.linalg.eigh(V.T @ H @ V)
    tau = k**2 / t.abs().max()
    phi = -torch.expm1(-tau * t.abs()) / t.abs()
    U = V @ S
    return U * phi @ U.T + c * (torch.eye(len(b), dtype=torch.float64) - V @ V.T)


@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "three values"])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_inverse_is_that_of_the_formula(name, k):
    H, b, d = matrix(SPECTRA[name]), vector(1), vector(2)
    product = Product(H)
    inverse = Lanczos(k).basis(product, product.cut(b))
    assert product.count == inverse.solution.iterations == k
    response, remainder = inverse.extend(product, product.cut(d))
    assert product.count == k + 1 and response.iterations == 1
    P = reference(H, b, k, inverse.outside)
    scale = float(P.abs().max())
    torch.testing.assert_close(dense(inverse, product), P, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(joined(inverse.solution.tensors), P @ b, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(joined(response.tensors), P @ d, rtol=0, atol=1e-9 * scale)
    for solution, side in ((inverse.solution, b), (response, d)):
        residual = float((side - H @ (P @ side)).norm() / side.norm())
        assert solution.residual == pytest.approx(residual, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(joined(remainder), d - H @ (P @ d), rtol=0, atol=1e-8 * scale * float(H.abs().max()))
    inside = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(H / H.norm(), j) @ b for j in range(k)], dim=1))[0]
    if k <= 3:  # powers are a basis of the same space while they are independent
        u = d - inside @ (inside.T @ d)
        u = u / u.norm()
        rayleigh, length = float(u @ H @ u), float((H @ u).norm())
        assert inverse.outside == pytest.approx(inverse.spectrum.phi(math.sqrt(abs(rayleigh) * length)), rel=1e-4)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 4, 10, 40])
def test_the_inverse_is_symmetric_and_positive_definite(name, k):
    product = Product(matrix(SPECTRA[name], seed=3))
    inverse = Lanczos(k).basis(product, product.cut(vector(4)))
    for seed in (5, 6):
        inverse.extend(product, product.cut(vector(seed)))
        P = dense(inverse, product)
        torch.testing.assert_close(P, P.T, rtol=0, atol=1e-9 * float(P.abs().max()))
        assert float(torch.linalg.eigvalsh((P + P.T) / 2)[0]) > 0


@given(SEEDS, st.integers(1, 10))
def test_definite_systems_up_to_k_are_solved(seed, size):
    rng = torch.Generator().manual_seed(seed)
    H, b, d = matrix(10 ** (2 * torch.rand(size, generator=rng) - 2), seed), vector(seed, size), vector(seed + 1, size)
    product = Product(H)
    inverse = Lanczos(10).basis(product, product.cut(b))
    assert product.count <= size and inverse.solution.status is SolverStatus.converged
    torch.testing.assert_close(joined(inverse.solution.tensors), torch.linalg.solve(H, b), rtol=1e-6, atol=1e-9)
    response, remainder = inverse.extend(product, product.cut(d))
    torch.testing.assert_close(joined(response.tensors), torch.linalg.solve(H, d), rtol=1e-6, atol=1e-9)
    assert float(joined(remainder).norm()) <= 1e-6 * float(d.norm())
    assert product.count <= size


def test_products_end_where_the_krylov_space_does():
    product = Product(matrix(SPECTRA["three values"]))
    solution = Lanczos(10).solve(product, product.cut(vector(1)))
    assert (product.count, solution.iterations, solution.status) == (3, 3, SolverStatus.converged)
    torch.testing.assert_close(
        joined(solution.tensors), torch.linalg.solve(product.H, vector(1)), rtol=1e-9, atol=1e-12
    )


def test_where_cg_resolves_the_condition_number_the_solution_is_as_near():
    H, b = matrix(SPECTRA["definite"]), vector(1)
    exact = torch.linalg.solve(H, b)
    near, cg = (solver.solve(lambda v: (H @ v[0],), (b,)).tensors[0] for solver in (Lanczos(10), CG(10, tolerance=0.0)))
    assert (near - exact).norm() <= 1.2 * (cg - exact).norm() + 1e-3 * exact.norm()


@given(SEEDS)
def test_the_slope_of_the_response_is_that_of_the_hypergradient(seed):
    H, f_y, push = matrix(SPECTRA["indefinite"], seed), vector(seed + 1), vector(seed + 2)
    product = Product(H)
    inverse = Lanczos(5).basis(product, product.cut(f_y))
    w = joined(inverse.extend(product, product.cut(push)).solution.tensors)
    assert float(f_y @ w) == pytest.approx(float(joined(inverse.solution.tensors) @ push), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "status", "negative"),
    [
        ("definite", SolverStatus.complete, 0.0),
        ("indefinite", SolverStatus.indefinite, 0.3),
        ("negative", SolverStatus.indefinite, 1.0),
        ("singular", SolverStatus.singular, 0.0),
        ("three values", SolverStatus.converged, 0.0),
    ],
)
def test_facts_of_the_spectrum(name, status, negative):
    spectrum = SPECTRA[name]
    product = Product(matrix(spectrum))
    inverse = Lanczos(12).basis(product, product.cut(vector(1)))
    assert inverse.solution.status is status and status.sentence
    assert inverse.negative == pytest.approx(negative, abs=0.25 if 0 < negative < 1 else 1e-9)
    assert inverse.largest == pytest.approx(float(spectrum.max()), rel=0.15)
    assert float(spectrum.min()) - 1e-6 <= inverse.smallest <= float(spectrum.mean()) + 1e-6


# ------------------------------------------------------------------------------------------------------- bad inputs


def test_zero_right_sides():
    product = Product(matrix(SPECTRA["definite"]))
    zero = product.cut(torch.zeros(SIZE, dtype=torch.float64))
    inverse = Lanczos().basis(product, zero)
    assert product.count == 0 and inverse.solution.status is SolverStatus.zero_rhs
    assert not joined(inverse.solution.tensors).any() and inverse.solution.residual == 0.0
    assert math.isnan(inverse.smallest) and math.isnan(inverse.largest) and inverse.negative == 0.0
    d = vector(1)
    response, _ = inverse.extend(product, product.cut(d))  # f_y = 0: a response along the one product
    torch.testing.assert_close(joined(response.tensors), inverse.outside * d)
    u = d / d.norm()
    assert product.count == 1 and response.status is SolverStatus.complete
    assert inverse.outside == pytest.approx(float((u @ product.H @ u * (product.H @ u).norm()) ** -0.5))
    full = Lanczos().basis(product, product.cut(d))
    taken = product.count
    response, remainder = full.extend(product, zero)
    assert response.status is SolverStatus.zero_rhs and product.count == taken
    assert not joined(response.tensors).any() and not joined(remainder).any()


@pytest.mark.parametrize("value", [3.0, -3.0])
@pytest.mark.parametrize("k", [1, 10])
def test_one_entry(value, k):
    def product(v):
        return (value * v[0],)

    inverse = Lanczos(k).basis(product, (torch.tensor(6.0, dtype=torch.float64),))
    assert float(inverse.solution.tensors[0]) == pytest.approx(2.0) and inverse.solution.iterations == 1
    assert inverse.solution.tensors[0].shape == ()
    response, _ = inverse.extend(product, (torch.tensor(-3.0, dtype=torch.float64),))
    assert float(response.tensors[0]) == pytest.approx(-1.0) and response.iterations == 0


def test_a_lower_loss_that_is_linear_in_y():
    product = Product(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    inverse = Lanczos().basis(product, product.cut(vector(1)))
    response, remainder = inverse.extend(product, product.cut(vector(2)))
    torch.testing.assert_close(joined(remainder), vector(2))
    blind = Lanczos().basis(product, product.cut(0 * vector(1)))
    unseen = blind.extend(product, product.cut(vector(2))).solution
    for solution in (inverse.solution, response, unseen):
        assert solution.status is SolverStatus.flat and not joined(solution.tensors).any()
    assert product.count == 3


def test_a_right_side_without_curvature():
    H = torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    product = Product(H)
    inverse = Lanczos().basis(product, (torch.zeros(0, 2), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)))
    assert inverse.solution.status is SolverStatus.flat and not joined(inverse.solution.tensors).any()
    response, remainder = inverse.extend(
        product, (torch.zeros(0, 2), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    )
    assert response.status is SolverStatus.complete
    torch.testing.assert_close(remainder[1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(response.tensors[1], torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_right_side_that_is_not_finite_is_passed_on(bad):
    product, b = Product(matrix(SPECTRA["definite"])), vector(1)
    b[3] = bad
    inverse = Lanczos().basis(product, product.cut(b))
    torch.testing.assert_close(joined(inverse.solution.tensors), b, equal_nan=True)
    good = Lanczos().basis(product, product.cut(vector(2)))
    for solution, count in ((inverse.solution, 0), (good.extend(product, product.cut(b)).solution, 0)):
        assert (solution.status, solution.iterations) == (SolverStatus.non_finite, count)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("good", [0, 1, 4])
def test_a_product_that_is_not_finite_is_left_out(bad, good):
    product, b = Product(matrix(SPECTRA["definite"])), vector(1)

    def breaking(pieces):
        image = product(pieces)
        return image if product.count <= good else tuple(bad * p for p in image)

    inverse = Lanczos(10).basis(breaking, product.cut(b))
    assert product.count == inverse.solution.iterations == good + 1
    assert inverse.solution.status is SolverStatus.non_finite
    expected = 0 * b if good == 0 else reference(product.H, b, good, 0.0) @ b
    if good:  # the horizon is that of the option k
        assert float(joined(inverse.solution.tensors) @ expected) > 0
    assert joined(inverse.solution.tensors).isfinite().all()
    response, remainder = inverse.extend(breaking, product.cut(vector(2)))
    assert joined(remainder).isfinite().all()
    assert response.status is SolverStatus.non_finite and joined(response.tensors).isfinite().all()
    assert inverse.outside == 0.0


def test_a_matrix_that_changes_between_products_is_seen():
    matrices = [matrix(SPECTRA["definite"], seed) for seed in range(12)]
    product = Product(matrices[0])

    def changing(pieces):
        product.H = matrices[product.count]
        return product(pieces)

    inverse = Lanczos(10).basis(changing, product.cut(vector(1)))
    assert inverse.solution.status is SolverStatus.asymmetric
    inverse.extend(product, product.cut(vector(2)))
    P = dense(inverse, product)
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-9 * float(P.abs().max()))
    assert float(torch.linalg.eigvalsh((P + P.T) / 2)[0]) > 0


# ------------------------------------------------------------------------------------------------ dtypes and devices


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.2)], ids=str
)
def test_dtypes_of_y(dtype, near):
    H, b = matrix(SPECTRA["definite"]).to(dtype), vector(1).to(dtype)
    solution = Lanczos(10).solve(lambda v: (H @ v[0],), (b,))
    assert solution.tensors[0].dtype == dtype and solution.status is SolverStatus.complete
    exact = torch.linalg.solve(matrix(SPECTRA["definite"]), vector(1))
    assert (solution.tensors[0].double() - exact).norm() <= (near + 0.01) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_the_basis(dtype):
    H, b, d = matrix(SPECTRA["indefinite"]), vector(1), vector(2)
    product = Product(H)
    full, stored = (Lanczos(8, kept).basis(product, product.cut(b)) for kept in (None, dtype))
    w, kept_w = (joined(inverse.extend(product, product.cut(d)).solution.tensors) for inverse in (full, stored))
    near = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    v, kept_v = joined(full.solution.tensors), joined(stored.solution.tensors)
    assert (v - kept_v).norm() <= near * v.norm() and (w - kept_w).norm() <= near * w.norm()
    assert kept_v.dtype == torch.float64 and product.count == 18
    assert float(b @ kept_w) == pytest.approx(float(kept_v @ d), rel=1e-2)
    P = dense(stored, product)
    assert float(torch.linalg.eigvalsh((P + P.T) / 2)[0]) > 0


def test_tensors_of_several_dtypes():
    H, b = matrix(SPECTRA["definite"]), vector(1)

    def product(pieces):
        image = H @ torch.cat([p.double() for p in pieces])
        return image[:9].float(), image[9:]

    solution = Lanczos(10).solve(product, (b[:9].float(), b[9:]))
    assert [t.dtype for t in solution.tensors] == [torch.float32, torch.float64]
    expected = Lanczos(10).solve(lambda v: (H @ v[0],), (b,)).tensors[0]
    torch.testing.assert_close(torch.cat([t.double() for t in solution.tensors]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_stay_orthonormal(dtype):
    H = matrix(torch.logspace(-12, 0, SIZE))  # Lanczos without reorthogonalisation would lose it here
    product = Product(H)
    layout = Layout(product.cut(vector(1)))
    rows = Rows(layout, 12, dtype)
    following = layout.flat(product.cut(vector(1)))
    for _ in range(12):
        row = rows.append([block / following[0].norm() for block in following])
        _, following = rows.outside(layout.flat(product(layout.shaped(row))), rows.count - 2)
    gram = torch.stack([rows.dots(rows.combine(unit)) for unit in torch.eye(12, dtype=torch.float64)])
    near = 1e-12 if dtype is None else 0.02
    torch.testing.assert_close(gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=near)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_on_another_device(dtype):
    """Vectors of an accelerator, without their numbers: every operation is on one device, results are with them."""
    with FakeTensorMode():
        tensors = (torch.empty(3, 2, device="cuda"), torch.empty(4, device="cuda", dtype=torch.float32))
        layout = Layout(tensors)
        rows = Rows(layout, 3, dtype, "cpu")
        for _ in range(2):
            found = [*rows.append(layout.flat(tensors))]
        coefficients, rest = rows.outside(layout.flat(tensors), 1)
        found += [*rest, coefficients, rows.dots(rest), *rows.combine(coefficients), *rows.row(0)]
        assert {t.device.type for t in found} == {"cuda"}
        assert {kept.device.type for kept in rows._kept} == {"cpu"}


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_where_they_are_already(device):
    product = Product(matrix(SPECTRA["indefinite"]))
    here, there = (solver.basis(product, product.cut(vector(1))) for solver in (Lanczos(8), Lanczos(8, device=device)))
    assert all(map(torch.equal, here.solution.tensors, there.solution.tensors))
    assert Lanczos(8, device=device) == Lanczos(8, device="cpu")


@pytest.mark.device
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_vectors_of_an_accelerator_on_the_cpu(dtype, device):
    H, b, d = (t.to(device, torch.float32) for t in (matrix(SPECTRA["indefinite"]), vector(1), vector(2)))
    here, there = (Lanczos(8, dtype, kept).basis(lambda v: (H @ v[0],), (b,)) for kept in (None, "cpu"))
    near = 1e-4 if dtype is None else 0.05
    for one, other in zip(
        (here.solution.tensors[0], here.extend(lambda v: (H @ v[0],), (d,)).solution.tensors[0]),
        (there.solution.tensors[0], there.extend(lambda v: (H @ v[0],), (d,)).solution.tensors[0]),
        strict=True,
    ):
        assert other.device == b.device
        assert (one - other).norm() <= near * one.norm()
    assert all(kept.device.type == "cpu" for kept in there._rows._kept)


def test_right_sides_are_not_written_to():
    H = matrix(SPECTRA["indefinite"]).requires_grad_()
    b, d = vector(1).requires_grad_(), vector(2)
    before = b.detach().clone(), d.clone(), H.detach().clone()
    inverse = Lanczos(4).basis(lambda v: (H @ v[0],), (b,))
    response, remainder = inverse.extend(lambda v: (H @ v[0],), (d,))
    remainder[0].zero_()
    assert all(torch.equal(now, then) for now, then in zip((b, d, H), before, strict=True))
    assert not any(s.tensors[0].requires_grad for s in (inverse.solution, response))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"k": 0}, "k"), ({"k": 2.5}, "k"), ({"dtype": torch.int64}, "dtype"), ({"dtype": 16}, "dtype")]
    + [({"device": given}, "device") for given in ("meta", "disk", 0)],
)
def test_options_out_of_range(options, word):
    with pytest.raises(OptionError, match=rf"Lanczos\({word}="):
        Lanczos(**options)


def test_it_is_a_linear_solver():
    solver = Lanczos(3)
    assert not solver.warm_start and not solver.resamples
