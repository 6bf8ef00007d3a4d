"""The example that measures the patterns of docs/porting.md runs."""

from __future__ import annotations

import math

import pytest
import torch

from examples import porting


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)  # as a script starts
    found = porting.main(["--iterations", "4"])
    shown = capsys.readouterr().out
    assert list(found) == list(porting.PATTERNS)
    for pattern, cells in found.items():
        assert pattern in shown and len(cells) == len(porting.RATES) + 1
        assert all(math.isfinite(loss) and cost > 0.0 for loss, cost in cells[-1:])
