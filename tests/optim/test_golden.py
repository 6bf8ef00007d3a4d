"""The single-level optimizers against the golden numbers, and against Armijo's test on random quadratics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB, DecSPS, SPSMax
from tests.optim.helpers import OptimizerInfo, every_search

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
MINIMA = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
CURVATURES = torch.tensor([[1.0, 2.0], [4.0, 1.0]], dtype=torch.float64)

SEARCH: dict[str, Any] = {"c": 0.1, "shrink": 0.5, "grow": 2.0}
RESETS = {"opt1": "initial", "opt2": "keep", "opt3": "grow"}
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "spsmax_c1": (SPSMax, {"lr": 1.0, "c": 1.0}),
    "spsmax_c05": (SPSMax, {"lr": 1.0, "c": 0.5}),
    "spsmax_lo": (SPSMax, {"lr": 1.0, "lower_bound": -0.5}),
    "decsps": (DecSPS, {"lr": 1.0}),
    "spsb": (SPSB, {"lr": 0.4}),
    "spsb_inv": (SPSB, {"lr": 0.4, "decay": "inverse"}),
    "spsb_2sample": (SPSB, {"lr": 0.4}),
    "envelope": (SPSB, {"lr": 0.5, "floor": 0.3}),
    **{
        f"sls_{option}": (SLS, {"lr": 0.9, "max_step": 0.9, "reset": reset, **SEARCH})
        for option, reset in RESETS.items()
    },
    **{f"slsb_{option}": (SLSB, {"lr": 0.9, "reset": reset, **SEARCH}) for option, reset in RESETS.items()},
}


def loss(x: Tensor, sample: int) -> Tensor:
    return 0.5 * (CURVATURES[sample] * (x - MINIMA[sample]) ** 2).sum()


@pytest.mark.parametrize("name", [name for name in ROWS if name in GOLDEN])
def test_golden(name: str) -> None:
    make, options = ROWS[name]
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = make([x], **options)
    *rows, last = GOLDEN[name]
    for row in rows:
        assert x.tolist() == pytest.approx(row["x"], rel=1e-9, abs=1e-12)
        sample = row["i"]
        other = {"step_closure": lambda: loss(x, 1 - sample)} if "2sample" in name else {}
        value = optimizer.step(lambda: loss(x, sample), **other)
        assert value.item() == pytest.approx(row["loss"], rel=1e-9)
        assert optimizer.record.step_size == pytest.approx(row["step"], rel=1e-9)
        assert optimizer.param_groups[0]["step_size"] == optimizer.record.step_size
        assert optimizer.record.trials == row["trials"]
        assert not other or optimizer.record.proposed == pytest.approx(row["ratio"], rel=1e-9)
    assert x.tolist() == pytest.approx(last["x"], rel=1e-9, abs=1e-12)


def test_no_golden_row_of_the_optimizers_is_left_out() -> None:
    names = {name for name in GOLDEN if name.startswith(("sps", "decsps", "sls", "envelope"))}
    assert names <= set(ROWS)


@every_search
@given(seed=st.integers(0, 10_000), lr=st.sampled_from([1e-3, 0.1, 10.0, None]))
def test_accepted_steps_decrease_sufficiently(info: OptimizerInfo, seed: int, lr: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    root, target = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
    x = nn.Parameter(torch.randn(4, generator=generator))

    def f(at: Tensor) -> Tensor:
        return ((root @ at - target) ** 2).sum()

    optimizer = info.make([x], lr)
    for _ in range(5):
        before = x.detach().clone()
        value = optimizer.step(lambda: f(x)).item()
        record = optimizer.record
        if not record.moved or "direction" in info.options:  # Adam steps along another direction than it certifies
            continue
        after = f(x).item()
        assert after == record.value
        assert after <= value - 0.1 * record.step_size * record.slope + 1e-12 * abs(value)
        ceiling = value / (0.1 * record.slope)
        assert record.step_size <= ceiling * (1 + 1e-12)
        (gradient,) = torch.autograd.grad(f(p := before.requires_grad_()), p)
        torch.testing.assert_close(x.detach(), before.detach() - record.step_size * gradient)
        if record.trials > 1:  # the trial before the last one failed
            failed = record.step_size * 2
            assert f(before - failed * gradient).item() > value - 0.1 * failed * record.slope
