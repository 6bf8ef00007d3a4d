"""An inverse is given from a hypergradient to the response at the same point and sample, and to no other."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from adaptive_bilevel.hypergradient import partial_gradients
from adaptive_bilevel.hypergradient.curvature import LowerCurvature
from adaptive_bilevel.hypergradient.lanczos import Lanczos
from adaptive_bilevel.hypergradient.shared_basis import expect, leave, take

SOLVER = Lanczos(3)


class Levels:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(0)
        self.data = torch.randn(40, 6, generator=rng).to(dtype)
        self.x = torch.full((6,), -1.0, dtype=dtype, requires_grad=True)
        self.y = torch.randn(6, generator=rng).to(dtype).requires_grad_()
        self.lower_rows, self.upper_rows = slice(0, 10), slice(20, 30)

    def lower(self):
        return ((self.data[self.lower_rows] @ self.y - 1) ** 2).mean() + (self.x.exp() * self.y**2).sum()

    def upper(self):
        return ((self.data[self.upper_rows] @ self.y + 1) ** 2).mean()

    def parts(self):
        """f_y, the lower loss, and its curvature."""
        _, f_y = partial_gradients(self.upper(), [self.x], [self.y])
        loss = self.lower()
        return f_y, loss, LowerCurvature(loss, [self.x], [self.y])

    def leave(self, solver: Lanczos = SOLVER):
        f_y, loss, curvature = self.parts()
        inverse = solver.basis(curvature.hvp, f_y)
        leave([self.y], solver, inverse, loss)
        return inverse

    def take(self, solver: Lanczos = SOLVER):
        f_y, loss, _ = self.parts()
        return take([self.y], solver, f_y, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [None, torch.bfloat16], ids=str)
def test_it_is_given_once(dtype, stored):
    levels, solver = Levels(dtype), Lanczos(3, stored)
    expect([levels.y])
    inverse = levels.leave(solver)
    assert levels.take(solver) is inverse
    assert levels.take(solver) is None


def test_nothing_is_kept_unless_expected():
    levels = Levels()
    kept = weakref.ref(levels.leave())
    gc.collect()
    assert kept() is None and levels.take() is None


def moved_x(levels):
    levels.x.data += 1e-3


def moved_y(levels):
    levels.y.data += 1e-3


def other_lower_sample(levels):
    levels.lower_rows = slice(10, 20)


def other_upper_sample(levels):
    levels.upper_rows = slice(30, 40)


@pytest.mark.parametrize("change", [moved_x, moved_y, other_lower_sample, other_upper_sample])
def test_it_is_not_given_elsewhere(change):
    levels = Levels()
    expect([levels.y])
    levels.leave()
    change(levels)
    assert levels.take() is None


def test_it_is_not_given_to_another_solver():
    levels = Levels()
    expect([levels.y])
    levels.leave()
    assert levels.take(Lanczos(4)) is None


def test_the_last_one_counts():
    levels = Levels()
    expect([levels.y])
    levels.leave()
    other_lower_sample(levels)
    last = levels.leave()
    assert levels.take() is last


def test_right_sides_without_a_basis_are_not_given():
    levels = Levels()
    expect([levels.y])
    f_y, loss, curvature = levels.parts()
    zero = tuple(torch.zeros_like(t) for t in f_y)
    leave([levels.y], SOLVER, SOLVER.basis(curvature.hvp, zero), loss)
    assert take([levels.y], SOLVER, zero, loss) is None


def test_it_dies_with_the_lower_tensors():
    levels = Levels()
    expect([levels.y])
    kept = weakref.ref(levels.leave())
    assert kept() is not None
    del levels
    gc.collect()
    assert kept() is None


def test_no_lower_tensors():
    expect([])
    assert take([], SOLVER, (), 0.0) is None
