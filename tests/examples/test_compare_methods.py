"""The example that compares all rows runs, and writes what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_methods.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("compare_methods", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_methods"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    stem = tmp_path / "compare"
    rows = ["soba", "d-tfbo", "bisls-adam", "stocbio + searches"]
    example().main(["--rows", *rows, "--budget", "60", "--output", str(stem)])
    shown = capsys.readouterr().out
    results = json.loads(stem.with_suffix(".json").read_text())
    assert list(results) == rows
    for row, by_task in results.items():
        assert f"| {row} |" in shown
        for task, result in by_task.items():
            assert result["iterations"] >= 1 and result["score"] < float("inf")
            assert (result["step"] is None) == (row != "soba"), task
    assert stem.with_suffix(".png").stat().st_size > 10_000
    assert stem.with_suffix(".md").read_text() in shown
