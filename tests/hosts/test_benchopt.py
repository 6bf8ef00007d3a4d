"""The solver for benchopt's benchmark of bilevel optimization, under benchopt itself where it is installed.

The benchmark's own losses are not needed: a problem of the same form, JAX functions of trees, is enough.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("benchopt")
jax: Any = pytest.importorskip("jax")
solver_file: Any = pytest.importorskip("examples.benchopt_solver")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
KEYS = jax.random.split(jax.random.PRNGKey(0), 3)
A, B = (jax.random.normal(key, (64, 4)) for key in KEYS[:2])
TARGET = jax.numpy.arange(64.0) / 32


def rows(a: Any, start: Any, batch_size: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(a, start, batch_size)


def f_inner(y: Any, x: Any, start: Any = 0, batch_size: int = 1) -> Any:
    part = rows(A, start, batch_size) @ y["w"] + y["b"] - rows(TARGET, start, batch_size)
    return (part**2).mean() + (jax.numpy.exp(x) * y["w"] ** 2).sum()


def f_outer(y: Any, x: Any, start: Any = 0, batch_size: int = 1) -> Any:
    return ((rows(B, start, batch_size) @ y["w"] + y["b"] - rows(TARGET, start, batch_size)) ** 2).mean()


def solved(iterations: int, **options: Any) -> Any:
    torch.set_default_dtype(torch.float32)
    solver = solver_file.Solver.get_instance(**options)
    y = {"w": jax.numpy.zeros(4), "b": jax.numpy.zeros(())}
    solver.set_objective(f_inner, f_outer, 64, 64, y, -2 * jax.numpy.ones(4))
    left = iter([True] * iterations + [False])
    solver.run(lambda: next(left))
    return solver.get_result()


def value(found: Any) -> float:
    return float(f_outer(found["inner_var"], found["outer_var"], 0, 64))


@pytest.mark.parametrize("batch_size", ["full", 16])
@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_the_outer_loss_falls(direction: str, batch_size: Any) -> None:
    first, last = (solved(k, direction=direction, batch_size=batch_size, n_inner_steps=10) for k in (1, 30))
    assert set(last) == {"inner_var", "outer_var"} and set(last["inner_var"]) == {"w", "b"}
    assert last["outer_var"].shape == (4,)
    assert value(last) < value(first)


def test_bridged_functions_have_their_derivatives() -> None:
    def function(start: Any, y: Any, x: Any) -> Any:
        return ((jax.numpy.sin(y) * x).sum() + start * (y**3).sum(),)

    y, x = (torch.randn(3, dtype=torch.float32, requires_grad=True) for _ in range(2))
    bridge = solver_file.Bridge(function)
    for start in (1, 2):
        (loss,) = bridge(start, y, x)
        (slope,) = torch.autograd.grad(loss, y, create_graph=True)
        expected = y.cos() * x + 3 * start * y**2
        torch.testing.assert_close(slope, expected)
        found = torch.autograd.grad(slope.sum(), [y, x])
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), [y, x]))
