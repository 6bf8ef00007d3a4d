"""The inverse of `Lanczos` that the response keeps where the hypergradient has left none."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from adaptive_bilevel import AutoSLS, BiSLS
from adaptive_bilevel.bilevel.tangent import JointTangent
from adaptive_bilevel.hypergradient import Lanczos, Neumann, implicit
from adaptive_bilevel.hypergradient.spectral_inverse import SpectralInverse

K = 8
ROWS, FEATURES = 60, 6


class Weighted:
    """A tanh network y, whose samples have weights sigmoid(x), in minibatches if `batch` is given.

    The hypergradient is that of one virtual step of length .1, as users' code computes it.
    """

    def __init__(self, *, batch: int | None = None, solver: Any = None, **options: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self.features = torch.randn(2 * ROWS, FEATURES, generator=generator)
        self.targets = torch.tanh(self.features @ torch.randn(FEATURES, 1, generator=generator))
        self.targets[: ROWS // 2] = torch.randn(ROWS // 2, 1, generator=generator)
        self.x = torch.zeros(ROWS, requires_grad=True)
        self.y = [
            (0.5 * torch.randn(*shape, generator=generator)).requires_grad_() for shape in ((FEATURES, 5), (5, 1))
        ]
        self.rng, self.batch, self.rows = generator, batch, torch.arange(ROWS)
        self.inner = AutoSLS(self.y)
        self.outer = BiSLS([self.x], lower=self.inner, solver=solver or Lanczos(K), **options)

    def predicted(self, y: list[Tensor], rows: Any) -> Tensor:
        return torch.tanh(self.features[rows] @ y[0]) @ y[1]

    def g(self, y: list[Tensor] | None = None) -> Tensor:
        errors = (self.predicted(self.y if y is None else y, self.rows) - self.targets[self.rows]).square()
        return (self.x[self.rows].sigmoid() * errors.squeeze(1)).mean()

    def f(self, y: list[Tensor] | None = None) -> Tensor:
        return mse_loss(self.predicted(self.y if y is None else y, slice(ROWS, None)), self.targets[ROWS:])

    def virtual(self) -> None:
        """Leave the gradient of f after one virtual step in .grad."""
        gradients = torch.autograd.grad(self.g(), self.y, create_graph=True)
        loss = self.f([p - 0.1 * g for p, g in zip(self.y, gradients, strict=True)])
        (self.x.grad,) = torch.autograd.grad(loss, [self.x])

    def run(self, iterations: int, differentiate: Callable[[Weighted], None] | None = None) -> list[int]:
        """Return the number of products with H of each upper step."""
        products = []
        for _ in range(iterations):
            if self.batch is not None:
                self.rows = torch.randperm(ROWS, generator=self.rng)[: self.batch]
            self.inner.step(self.g)
            (differentiate or Weighted.virtual)(self)
            before = self.outer.evaluations.lower.hvps
            self.outer.step(self.f)
            products.append(self.outer.evaluations.lower.hvps - before)
        return products

    @property
    def kept(self) -> dict[str, Any]:
        return state_of(self.outer)


def state_of(outer: BiSLS) -> dict[str, Any]:
    """Return what the response keeps between steps."""
    states: dict[Any, Any] = outer.state
    found: dict[str, Any] = states.get("response", {})
    return found


def by(solver: Any) -> Callable[[Weighted], None]:
    """Return an implicit hypergradient by a solver."""

    def differentiate(problem: Weighted) -> None:
        (problem.x.grad,) = implicit(problem.f, problem.g, [problem.x], problem.y, solver)

    return differentiate


@pytest.mark.parametrize("batch", [None, 12])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_an_inverse_serves_for_one_step_then_two_then_four_up_to_half_of_k(batch: int | None, direction: str) -> None:
    problem = Weighted(batch=batch, direction=direction)
    assert problem.run(3 + 2 * K) == [K + 1, K + 1, 1, *4 * [K + 1, 1, 1, 1]]


def test_nothing_is_kept_where_the_hypergradient_leaves_its_inverse() -> None:
    problem = Weighted()
    assert problem.run(3, by(Lanczos(K))) == 3 * [1]
    assert "inverse" not in problem.kept
    problem.run(1)
    assert problem.kept["inverse"]
    problem.run(1, by(Lanczos(K)))  # and what was kept is given up
    assert not problem.kept["inverse"]
    assert problem.run(3) == [K + 1, K + 1, 1]


def test_another_solver_has_its_own() -> None:
    problem = Weighted(solver=Neumann(3, 0.1))
    assert min(problem.run(3)) >= 3
    assert not problem.kept.get("uses")
    problem.outer.solver = Lanczos(K)
    assert problem.run(3) == [K + 1, K + 1, 1]
    problem.outer.solver = Lanczos(K + 1)
    assert problem.run(2) == [K + 2, 1]


def test_other_lower_tensors_have_an_inverse_of_their_own() -> None:
    problem = Weighted()
    problem.run(4)
    problem.y = [p.detach()[:, :3].clone().requires_grad_() if p.shape[1] > 1 else p for p in problem.y]
    problem.y[1] = problem.y[1].detach()[:3].clone().requires_grad_()
    problem.inner = AutoSLS(problem.y)
    problem.outer.bind(problem.inner)
    assert problem.run(1) == [K + 1]


@pytest.mark.parametrize("batch", [None, 12])
def test_the_slope_is_that_of_the_hypergradient_with_the_same_inverse(
    batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the inverse of an earlier step."""
    found, drop = [], JointTangent._drop_graph

    def looked(self: JointTangent) -> None:
        if self.offsets is not None:
            promised = sum(float(torch.vdot(*pair)) for pair in zip(self.hypergradient(), self.path.along, strict=True))
            found.append((self._inverse.again, self.slope, promised))
        drop(self)

    monkeypatch.setattr(JointTangent, "_drop_graph", looked)
    problem = Weighted(batch=batch)
    problem.run(2 * K)
    assert [again for again, _, _ in found].count(False) == 6
    for _, slope, expected in found:
        assert slope == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch", [None, 12])
def test_where_d_ascends_the_step_follows_the_hypergradient_with_the_same_inverse(batch: int | None) -> None:
    """Downhill, and without a second product with H where the inverse is an earlier one: its c stays."""

    def ascending(problem: Weighted) -> None:
        problem.virtual()
        assert problem.x.grad is not None
        problem.x.grad.neg_()

    problem = Weighted(batch=batch)
    for products in [K + 2, K + 2, 1, K + 2, 1, 1, 1]:
        assert problem.run(1, ascending) == [products]
        record = problem.outer.record
        assert record is not None and record.slope > 0.0 and record.moved


@pytest.mark.parametrize("rank", [3, 12])
def test_an_inverse_is_symmetric_and_definite_for_right_sides_of_others(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    H = half @ half.T - 0.5 * torch.eye(12, dtype=torch.float64)
    b, u, v = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    inverse = Lanczos(5).basis(lambda t: (H @ t[0],), (b,))
    Pu = inverse.extend(lambda t: (H @ t[0],), (u,)).solution.tensors[0]
    torch.testing.assert_close(inverse.apply((u,))[0], Pu)
    torch.testing.assert_close(v @ Pu, u @ inverse.apply((v,))[0])
    assert float(v @ inverse.apply((v,))[0]) > 0.0


@pytest.mark.parametrize("k", [3, 30])
def test_restored(k: int) -> None:
    """To the bit, without a copy; None for tensors of another size."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(8, 8, generator=generator)
    H, b, u = half @ half.T, torch.randn(8, generator=generator), torch.randn(8, generator=generator)

    def product(pieces: Any) -> Any:
        return (H @ torch.cat([t.reshape(-1) for t in pieces])).split([2, 6])

    b_, u_ = b.split([2, 6]), u.split([2, 6])
    inverse = Lanczos(k).basis(product, b_)
    again = SpectralInverse.restored(b_, inverse.saved())
    assert again is not None
    found = [P.extend(product, u_).solution.tensors for P in (again, inverse)]
    assert all(map(torch.equal, *found))
    assert again.report() == inverse.report()
    assert again.saved()["rows"][0].data_ptr() == inverse.saved()["rows"][0].data_ptr()
    assert SpectralInverse.restored([b], inverse.saved()) is not None  # the flat form is the same
    assert SpectralInverse.restored([b[:7]], inverse.saved()) is None


@pytest.mark.parametrize("steps", [1, 4, K])
def test_a_resumed_run_is_the_same_to_the_bit(steps: int) -> None:
    """Through a file, and whatever the run that was saved does afterwards."""
    problem = Weighted(batch=12, direction="adam")
    problem.run(steps)
    file = io.BytesIO()
    saved = [copy.deepcopy(level.state_dict()) for level in (problem.inner, problem.outer)]
    held = problem.outer.state_dict()
    torch.save((saved, problem.x, problem.y, problem.rng.get_state()), file)
    products = problem.run(K + 1)
    assert str(held) == str(saved[1])  # nothing was changed in place

    file.seek(0)
    states, x, y, rng = torch.load(file)
    again = Weighted(batch=12, direction="adam")
    with torch.no_grad():
        for p, value in zip([again.x, *again.y], [x, *y], strict=True):
            p.copy_(value)
    for level, state in zip((again.inner, again.outer), states, strict=True):
        level.load_state_dict(state)
    again.rng.set_state(rng)
    assert again.run(K + 1) == products
    assert torch.equal(again.x, problem.x) and all(map(torch.equal, again.y, problem.y))


def test_a_lower_loss_that_is_linear_leaves_nothing_to_keep() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    outer = BiSLS([x], lower=(inner := torch.optim.SGD([y], 0.1)), solver=Lanczos(K))
    for _ in range(3):
        inner.zero_grad()
        (x * y).sum().backward()
        inner.step()
        x.grad = torch.ones(2)
        outer.step(lambda: (x - 3.0).square().sum() + y.square().sum(), lambda: (x * y).sum())
    assert torch.isfinite(x).all()
    assert not state_of(outer).get("inverse")
