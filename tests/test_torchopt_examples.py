"""The TorchOpt examples run, and show what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples import torchopt_imaml, torchopt_ridge


def test_ridge(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchopt_ridge, "FIRST_TRIALS", (None, 1e4))
    monkeypatch.setattr(torchopt_ridge, "FIXED", {"SGD": (1e-2,), "Adam": (1e-3,)})
    figure, output = tmp_path / "ridge.png", tmp_path / "ridge.json"
    torchopt_ridge.main(["--iterations", "25", "--figure", str(figure), "--output", str(output)])
    assert "BiSLS-Adam none" in capsys.readouterr().out and figure.stat().st_size > 1000
    runs = {run["name"]: run for run in json.loads(output.read_text())["runs"]}
    for name, bar in {"BiSLS-SGD none": 0.01, "BiSLS-SGD 10000": 0.01, "BiSLS-Adam none": 0.01}.items():
        assert runs[name]["final"] <= bar and runs[name]["failed"] == 0
    assert runs["SGD 0.01"]["final"] > 0.5 and runs["Adam 0.001"]["final"] > 0.5


def test_imaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTIVE_BILEVEL_DATA", raising=False)
    monkeypatch.setattr(torchopt_imaml, "TEST_TASKS", 2)
    torch.set_default_dtype(torch.float32)  # as a script starts; the next test sets its own
    figure, output = tmp_path / "imaml.png", tmp_path / "imaml.json"
    arguments = ["--iterations", "2", "--first-trials", "none", "1", "--adam", "1e-3"]
    torchopt_imaml.main([*arguments, "--figure", str(figure), "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [run["name"] for run in runs] == ["BiSLS-SGD none", "BiSLS-SGD 1", "Adam 0.001"]
    assert all(0.0 <= run["final"] <= 1.0 for run in runs) and runs[0]["steps"][0] > 0.0
    assert figure.stat().st_size > 1000
