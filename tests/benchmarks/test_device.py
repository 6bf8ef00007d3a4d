"""The script for devices runs without one, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import device


def test_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    output = tmp_path / "device.json"
    command = ["--device", "cpu", "--models", "a", "--repeats", "2", "--iterations", "10", "--without-tests"]
    found = device.main([*command, "--output", str(output)])
    assert json.loads(output.read_text()) == found
    assert [row["rule"] for row in found["one_level"]] == list(device.RULES)
    for row in found["one_level"]:
        assert row["host_syncs"] is row["kernels"] is row["syncs_hold"] is None
        assert 0 < row["operations"] < 200
    for row in found["two_levels"]:
        assert row["losses"][-1] < row["losses"][0]
    assert found["demo"]["validation_losses"][-1] < 0.3 and found["demo"]["accuracy"] > 0.5
    assert "host syncs" in capsys.readouterr().out
