"""The projections themselves: nearest points, far points, numbers beyond a dtype, and a radius that is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.optim.projection import Ball, Box, Simplex
from tests.bilevel.helpers import SETS


@pytest.mark.parametrize("kind", ["box", "simplex"])
def test_the_projections_are_the_nearest_points(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    project = SETS[kind]
    for _ in range(20):
        z = 2 * torch.randn(3, 4, generator=generator)
        p = z.clone()
        project([p])
        for _ in range(20):
            other = torch.rand(3, 4, generator=generator)
            other = 1.5 * other / other.sum(-1, keepdim=True) if kind == "simplex" else other * 0.75 - 0.5
            assert float(((z - p) * (other - p)).sum()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_simplex_projection_of_far_points(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e20, -2e20, -1e20], [3e10, 1.0, 3e10]], dtype=dtype)
    Simplex()([x, torch.zeros(0, dtype=dtype)])
    assert torch.equal(x, torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]], dtype=dtype))


FAR: list[tuple[Any, list[float], list[float]]] = [
    (Box(0.0, 1e300), [-1.0, 2.0], [0.0, 2.0]),
    (Box(-1e300, 1.0), [-1.0, 2.0], [-1.0, 1.0]),
    (Ball(1.0), [3e4, 4e4], [0.6, 0.8]),
    (Ball(1.0), [3e37, 4e37], [0.6, 0.8]),
    (Ball(5e-30), [3e-29, 4e-29], [3e-30, 4e-30]),
    (Simplex(1e-300), [1.0, 2.0], [0.0, 0.0]),
    (Simplex(1.0), [torch.nan, 2.0], [torch.nan, torch.nan]),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("project", "far", "near"), FAR, ids=str)
def test_projections_beyond_the_dtype(project: Any, far: list[float], near: list[float], dtype: torch.dtype) -> None:
    x, expected = torch.tensor(far, dtype=dtype), torch.tensor(near, dtype=dtype)
    if x.isinf().any():
        pytest.skip("no number of this dtype")
    project([x])
    assert torch.allclose(x, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reach", [1.0, 2e4, 2e38])
def test_the_simplex_projection_of_many_entries(reach: float, dtype: torch.dtype) -> None:
    """Sums over 20000 entries leave float16, and those of large ones every dtype; bfloat16 counts to 256."""
    if reach > torch.finfo(dtype).max:
        pytest.skip("no number of this dtype")
    x = torch.linspace(-reach, 0.0, 20000).to(dtype)
    x[:3] = 0.5 * torch.arange(3)
    expected = x.double()
    Simplex(1.0)([x])
    Simplex(1.0)([expected])
    assert torch.allclose(x.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert x.count_nonzero() == expected.count_nonzero()


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=4), st.floats(0.1, 10))
def test_the_ball_is_the_nearest_point(numbers: list[float], radius: float) -> None:
    x = [torch.tensor(numbers[:1]), torch.tensor(numbers[1:])]
    flat = torch.cat(x)
    Ball(radius)(x)
    projected = torch.cat(x)
    assert float(projected.norm()) <= radius * (1 + 1e-12)
    if float(flat.norm()) <= radius:
        assert torch.equal(projected, flat)
    else:  # the residual is normal to the ball there
        assert torch.allclose(projected / projected.norm(), flat / flat.norm())


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), None])
def test_the_ball_refuses(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"Ball\(radius="):
        Ball(wrong)
