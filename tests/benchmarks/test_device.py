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
    command = ["--device", "cpu", "--models", "a", "--repeats", "2", "--without-tests", "--output", str(output)]
    found = device.main(command)
    assert json.loads(output.read_text()) == found
    assert [row["rule"] for row in found["one_level"]] == list(device.RULES)
    for row in found["one_level"]:
        assert row["host_syncs"] is row["kernels"] is row["syncs_hold"] is None
        assert 0 < row["operations"] < 200
    for row in found["two_levels"]:
        assert row["losses"][-1] < row["losses"][0]
    assert "host syncs" in capsys.readouterr().out
