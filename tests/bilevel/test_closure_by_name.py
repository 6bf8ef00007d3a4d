"""The upper closure under the name that torch's optimizers have for theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import ClosureError


@pytest.mark.parametrize("cls", [BiSLS, BiSPS, OneStepBiSLS])
def test_a_closure_by_its_name_is_the_upper_closure(cls: Any) -> None:
    reached = []
    for name in ("upper_closure", "closure"):
        x, y = torch.full((3,), 2.0, requires_grad=True), torch.zeros(3, requires_grad=True)
        inner = SLS([y])
        outer = cls([x], lower=inner)

        def loss(x: Any = x, y: Any = y) -> Any:
            return (y + x).square().sum()

        def lower(x: Any = x, y: Any = y) -> Any:
            return (y - x).square().sum()

        inner.step(lower)
        x.grad = torch.ones(3)
        outer.step(**{name: loss})
        reached.append(x.detach())
        with pytest.raises(ClosureError, match="two names"):
            outer.step(loss, closure=loss)
    assert torch.equal(*reached) and not torch.equal(reached[0], torch.full((3,), 2.0))
