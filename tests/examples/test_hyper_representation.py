"""The demo, shortened: its lines in a log, its table and its picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import hyper_representation


def test_the_demo_prints_a_line_for_each_run_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    hyper_representation.main(["--iterations", "10", "--output", str(tmp_path / "demo.png")])
    out, err = capsys.readouterr()
    assert re.findall(r"^(.*\S) +iteration +10/10 +validation loss", out, re.MULTILINE) == list(
        hyper_representation.METHODS
    )
    assert err == ""  # a bar is for terminals
    assert "\r" not in out and "Picture" in out
    assert (tmp_path / "demo.png").is_file()
