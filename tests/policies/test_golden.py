"""The policies give the golden rows of the single level and of S-TFBO, whatever kind their scalars are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.policies import SLS, SLSB, SPSB, Constant, DecSPS, Envelope, GradientNorm, Outcome, Policy, SPSMax
from tests.single_level import GOLDEN, run

TOLERANCE = 1e-9
SEARCH: dict[str, Any] = {"c": 0.1, "shrink": 0.5, "grow": 2.0}

# The columns beside x, step and trials that are part of the contract.
POLYAK = ("proposed", "bound")
ROWS: dict[str, tuple[Policy[Any], tuple[str, ...]]] = {
    "sgd_sqrt": (Constant(bound=0.25, decay="inverse_sqrt"), ("bound",)),
    "sgd_inv": (Constant(bound=0.25, decay="inverse"), ("bound",)),
    "spsmax_c1": (SPSMax(bound=1.0), ("proposed",)),
    "spsmax_c05": (SPSMax(bound=1.0, c=0.5), ()),
    "spsmax_lo": (SPSMax(bound=1.0, lower_bound=-0.5), ("proposed",)),
    "decsps": (DecSPS(bound=1.0), ()),
    "spsb": (SPSB(bound=0.4), POLYAK),
    "spsb_inv": (SPSB(bound=0.4, decay="inverse"), POLYAK),
    "spsb_2sample": (SPSB(bound=0.4), POLYAK),
    "sls_opt1": (SLS(start=0.9, max_step=0.9, reset="initial", **SEARCH), ()),
    "sls_opt2": (SLS(start=0.9, max_step=0.9, reset="keep", **SEARCH), ()),
    "sls_opt3": (SLS(start=0.9, max_step=0.9, reset="grow", **SEARCH), ()),
    "slsb_opt1": (SLSB(bound=0.9, reset="initial", **SEARCH), ("bound",)),
    "slsb_opt3": (SLSB(bound=0.9, reset="grow", **SEARCH), ("bound",)),
    "envelope": (Envelope(bound=0.5, decay="inverse_sqrt", floor=0.3), POLYAK),
}


def floats(number: float) -> float:
    return number


def numpy_scalar(number: float) -> Any:
    return np.float64(number)


def numpy_array(number: float) -> Any:
    return np.asarray(number)


def torch_tensor(number: float) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(number, dtype=torch.float64)


def jax_array(number: float) -> Any:
    return pytest.importorskip("jax.numpy").asarray(number)


KINDS = [floats, numpy_scalar, numpy_array, torch_tensor, jax_array]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Iterator[Callable[[float], Any]]:
    """A converter from floats to double-precision scalars of one framework."""
    if request.param is jax_array:
        jax = pytest.importorskip("jax")
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        yield request.param
        jax.config.update("jax_enable_x64", before)
    elif request.param is torch_tensor:
        torch = pytest.importorskip("torch")
        torch.set_default_dtype(torch.float32)  # must not matter; the fixture `reproducible` takes it back
        yield request.param
    else:
        yield request.param


def near(value: Any, expected: float) -> bool:
    return float(value) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("name", ROWS)
def test_golden_row(name: str, kind: Callable[[float], Any]) -> None:
    policy, columns = ROWS[name]
    *rows, end = GOLDEN[name]
    step_order = (1, 0, 1) if name.endswith("2sample") else None
    visits, x = run(policy, step_order=step_order, kind=kind)
    for visit, row in zip(visits, rows, strict=True):
        assert visit.x == pytest.approx(row["x"], rel=TOLERANCE, abs=TOLERANCE)
        assert near(visit.record.step_size, row["step"])
        assert int(visit.record.trials) == row["trials"]
        if "bound" in columns:
            assert near(visit.record.bound, row["bound"])
        if "proposed" in columns:
            assert near(visit.record.proposed, row["ratio"])
        assert Outcome(int(visit.record.outcome)) in (Outcome.accepted, Outcome.at_bound, Outcome.at_floor)
    assert x == pytest.approx(end["x"], rel=TOLERANCE, abs=TOLERANCE)
    assert int(visits[-1].state.count) == len(rows)


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("sgd_sqrt", ["accepted", "accepted", "accepted"]),
        ("spsb", ["accepted", "accepted", "at_bound"]),
        ("envelope", ["accepted", "at_floor", "at_bound"]),
        ("decsps", ["accepted", "accepted", "at_bound"]),
    ],
)
def test_outcomes_of_golden_rows(name: str, outcomes: list[str], kind: Callable[[float], Any]) -> None:
    policy, _ = ROWS[name]
    visits, _ = run(policy, kind=kind)
    assert [Outcome(int(visit.record.outcome)).name for visit in visits] == outcomes


def test_stfbo(kind: Callable[[float], Any]) -> None:
    """Gradients of b1 at (x, y, v), accumulators first, then all three variables move (Jacobi)."""
    lower, auxiliary, upper = GradientNorm(), GradientNorm(coupling="max"), GradientNorm(coupling="product")
    y_state, v_state, x_state = lower.init(), auxiliary.init(), upper.init()
    x, y, v = 4.0, 0.0, 0.0
    *rows, end = GOLDEN["stfbo"]
    for row in rows:
        assert [x, y, v] == pytest.approx([*row["x"], *row["y"], *row["v"]], abs=TOLERANCE)
        g_y, residual, h = 2 * y - x, 2 * v - (y - 1), 0.1 * x + v
        loss = kind(y * y - x * y)
        y_record, y_state = lower.step(y_state, loss=loss, slope=kind(g_y**2))
        v_record, v_state = auxiliary.step(v_state, loss=loss, slope=kind(residual**2), shared=[y_state])
        x_record, x_state = upper.step(x_state, loss=loss, slope=kind(h**2), shared=[y_state, v_state])
        assert near(y_state.squares, row["beta"] ** 2)
        assert near(v_state.squares, row["gamma"] ** 2)
        assert near(x_state.squares, row["alpha"] ** 2)
        assert near(v_record.step_size, 1 / row["phi"])
        y -= float(y_record.step_size) * g_y
        v -= float(v_record.step_size) * residual
        x -= float(x_record.step_size) * h
    assert [x, y, v] == pytest.approx([*end["x"], *end["y"], *end["v"]], abs=TOLERANCE)


@pytest.mark.parametrize("name", ROWS)
def test_state_is_plain_numbers_after_a_run_on_floats(name: str) -> None:
    last = run(ROWS[name][0])[0][-1]
    assert {type(value) for value in last.state} <= {int, float}
    assert type(last.state.count) is int
    assert {type(value) for value in last.record[:3]} == {float}
