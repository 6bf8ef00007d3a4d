"""The script that compares searches through an inner loop runs, and its tangents are those of the loops."""

from __future__ import annotations

import math

import pytest
import torch

import unrolled_tangent


@pytest.mark.filterwarnings("default::adaptive_bilevel.errors.AdaptiveBilevelWarning")
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = unrolled_tangent.main(["--iterations", "2", "--repeats", "1"])
    assert len(found) == 2 * len(unrolled_tangent.LOOPS)
    assert all(math.isfinite(loss) for _, runs in found.values() for loss, _, _ in runs)
    assert "| MAML |" in capsys.readouterr().out


@pytest.mark.parametrize("name", unrolled_tangent.LOOPS)
def test_tangents(name: str) -> None:
    loop = unrolled_tangent.LOOPS[name]()
    along = [torch.randn_like(p) for p in loop.x]
    y = loop.run(loop.x, True)
    h, f_y = (torch.autograd.grad(loop.val(y), of, retain_graph=True) for of in (loop.x, y))
    pushed = sum((g * w).sum() for g, w in zip(f_y, unrolled_tangent.pushed(loop, along), strict=True))
    promised = -sum((g * d).sum() for g, d in zip(h, along, strict=True))
    torch.testing.assert_close(pushed, promised)
