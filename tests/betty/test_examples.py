"""The examples run, and show what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples import betty_logistic_hpo, betty_overhead, betty_reweighting, betty_ridge

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave")


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_logistic_regression(tmp_path: Path, direction: str) -> None:
    """By upper step 10 no number is where the example's own learning rates are not by step 100."""
    options = ["--figure", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.json")]
    own, ours = betty_logistic_hpo.main(["--few", "--iterations", "10", "--direction", direction, *options])
    assert own.at(10) == pytest.approx(0.5002, abs=1e-3)
    assert ours.at(10) <= 0.25
    assert math.isnan(ours.at(11))
    assert (tmp_path / "a.png").stat().st_size > 0
    assert [row["upper"] for row in json.loads((tmp_path / "a.json").read_text())["runs"]] == [1.0, None]


def test_short_first_trials_catch_up() -> None:
    run = betty_logistic_hpo.Run("BiSLS-Adam + SLS", 1.0, 0.1, seed=0)
    assert betty_logistic_hpo.train(run, "cg", 31, "adam").at(30) <= 0.2


def test_ridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("BATCHES", (None,)), ("UPPER_RATES", (10.0,)), ("LOWER_RATES", (0.03,))):
        monkeypatch.setattr(betty_ridge, name, few)
    fixed, *ours = betty_ridge.main(["--seeds", "3", "--output", str(tmp_path / "a.json")])
    assert len(ours) == 3
    assert all(row["gaps"][0] < fixed["gaps"][0] / 10 for row in ours)
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == [fixed, *ours]


def test_reweighting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(betty_reweighting, "FIXED", betty_reweighting.FIXED[:2])
    options = ["--iterations", "30", "--figure", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.json")]
    runs = betty_reweighting.main(options)
    ours = runs[-1]
    assert ours.method.startswith("BiSLS")
    assert ours.trusted > 3 * ours.mistrusted
    assert ours.final > 0.8
    assert (tmp_path / "a.png").stat().st_size > 0


def test_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", torch.autograd.grad)  # it times these, for the process's life
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    monkeypatch.setattr(betty_overhead, "BATCH", 2)
    rows = betty_overhead.main(["--repeats", "1", "--output", str(tmp_path / "a.json")])
    assert rows[0]["name"] == "SGD / SGD"
    assert all(row["outer"]["step"] > 0 for row in rows)
