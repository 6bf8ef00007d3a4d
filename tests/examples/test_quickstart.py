"""The quick-start programs are short, and print what they promise."""

from __future__ import annotations

import logging
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
PROGRAMS = {
    "plain_pytorch": [2.181, 0.915, 0.751, 0.732],
    "with_torchopt": [0.741],
    "with_betty": [6.298, 0.741],
    "with_lightning": [0.742],
}
"""The validation losses that each prints. Betty's program also prints the loss of the untrained model."""
HOST = {"with_torchopt": "torchopt", "with_betty": "betty", "with_lightning": "pytorch_lightning"}


def test_every_program_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PROGRAMS)


@pytest.mark.parametrize(("name", "losses"), PROGRAMS.items())
def test_a_program_prints_its_losses(
    name: str, losses: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in HOST:
        pytest.importorskip(HOST[name])
    if name == "with_lightning":
        warnings.simplefilter("ignore")  # theirs
    monkeypatch.setattr(logging.getLogger("betty"), "disabled", True)  # it prints each problem
    torch.set_default_dtype(torch.float32)  # as a script starts; the next test sets its own
    program = FOLDER / f"{name}.py"
    runpy.run_path(str(program), run_name="__main__")
    printed = [float(loss) for loss in re.findall(r"validation loss (\S+)", capsys.readouterr().out)]
    assert printed == pytest.approx(losses, rel=0.02)
    assert len(program.read_text().splitlines()) <= 30
