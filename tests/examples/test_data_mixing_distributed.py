"""The example of data mixing runs in one process, and its model is a GPT without second derivatives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from examples import data_mixing_distributed


@pytest.mark.filterwarnings("default::adaptive_bilevel.errors.AdaptiveBilevelWarning")
def test_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.delenv("RANK", raising=False)
    output = tmp_path / "runs.json"
    command = ["data_mixing_distributed.py", "--iterations", "4", "--lower-steps", "2", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    data_mixing_distributed.main()
    (loss,) = map(float, re.findall(r"held-out loss (\S+)", capsys.readouterr().out))
    (run,) = json.loads(output.read_text())["runs"]
    assert loss == pytest.approx(run["held_out_loss"], abs=1e-3)
    assert loss < 3.4  # of the logarithm of 32
    kept, _, second, third, noise = run["weights"]
    assert kept > max(second, third, noise)
