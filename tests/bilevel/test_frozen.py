"""Upper tensors that do not require a gradient, with one set by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import HypergradientError


@pytest.mark.parametrize("cls", [BiSLS, BiSPS, OneStepBiSLS])
def test_a_hypergradient_of_frozen_tensors_only_is_refused(cls: Any) -> None:
    x, z = torch.full((2,), 3.0), torch.full((3,), 1.0, requires_grad=True)
    y = torch.zeros(2, requires_grad=True)
    inner = SLS([y])
    outer = cls([x, z], lower=inner)

    def lower() -> Any:
        return (y - x).square().sum() + y.square().sum()

    def upper() -> Any:
        return (y - 1.0).square().sum() + 0.1 * x.square().sum()

    inner.step(lower)
    x.grad = torch.full((2,), 0.5)
    with pytest.raises(HypergradientError, match=r"requires_grad=False.*requires_grad_\(\)"):
        outer.step(upper)
    assert x.tolist() == [3.0, 3.0] and outer.record is None
    x.requires_grad_()
    outer.step(upper)
    assert x.tolist() != [3.0, 3.0]
