"""A ridge problem with eight regularisers: no number given, sixty upper steps of ten lower ones each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel_betty import SLS, SPSB, BiSLS, BiSPS, bind
from tests.betty_problems import Ridge, engine, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:BiSLS. for 20 steps")

UPPER, T = 60, 10


def gap(seed: int, outer: Any, inner: Any, batch: int | None = None, kind: str = "adaptive_cg") -> float:
    """F - F* at the end."""
    toy = Ridge(seed)
    top, low = toy.levels(outer, inner, batch=batch, T=T, type=kind)
    bind(engine(low, top, steps=UPPER * T)).run()
    return float(toy.F(top.value)) - toy.minimum()


@pytest.mark.parametrize("seed", [0, 2])
def test_full_batch_with_no_number(seed: int) -> None:
    assert gap(seed, BiSLS, SLS) <= 1e-3


@pytest.mark.parametrize("seed", [1, 3])
def test_minibatches_with_no_number(seed: int) -> None:
    assert gap(seed, BiSLS, SLS, batch=16) <= 2e-3


@pytest.mark.parametrize(("upper", "lower"), [(1.0, 1e3), (1e4, 1e-3)])
def test_first_trials_far_off(upper: float, lower: float) -> None:
    assert gap(2, lambda p: BiSLS(p, upper), lambda p: SLS(p, lower)) <= 1e-3


def test_polyak_steps() -> None:
    toy = Ridge(2)
    start = float(toy.F(torch.zeros(toy.d))) - toy.minimum()
    assert gap(2, lambda p: BiSPS(p, 10.0), SPSB) < 0.5 * start
    assert gap(2, sgd(10.0), sgd(0.1)) < 0.5 * start
