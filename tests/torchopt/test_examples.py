"""The TorchOpt examples run, and show what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaptive_bilevel_torchopt import UpperStep
from examples import torchopt_hpo, torchopt_imaml, torchopt_overhead


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_hpo(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchopt_hpo, "FIRST_TRIALS", (None, 1e4))
    monkeypatch.setattr(torchopt_hpo, "FIXED", {"SGD": (1e-2,), "Adam": (1e-3,)})
    figure, output = tmp_path / "hpo.png", tmp_path / "hpo.json"
    torchopt_hpo.main(["--loss", kind, "--iterations", "25", "--figure", str(figure), "--output", str(output)])
    assert "BiSLS-Adam none" in capsys.readouterr().out and figure.stat().st_size > 1000
    runs = {run["name"]: run for run in json.loads(output.read_text())["runs"]}
    for name in ("BiSLS-SGD none", "BiSLS-SGD 10000", "BiSLS-Adam none"):
        assert runs[name]["final"] <= 0.01 and runs[name]["failed"] == 0
    assert all(runs[name]["final"] > 0.85 * runs[name]["gaps"][0] for name in ("SGD 0.01", "Adam 0.001"))


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")  # the search starts at the solution
@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_hypergradient_of_hpo_is_the_closed_form(kind: str) -> None:
    """The closed form is the slope of F; the one that reaches the step at y*(x) is that."""
    data = torchopt_hpo.Data.draw(kind)
    x = torch.linspace(-3.0, 1.0, torchopt_hpo.FEATURES).requires_grad_()
    inner = torchopt_hpo.Regression(x, data, automatic=True)
    inner.y.data.copy_(data.solution(x.detach()))
    expected = data.hypergradient(x.detach())
    slopes = [(data.F(x + 1e-5 * e) - data.F(x - 1e-5 * e)) / 2e-5 for e in torch.eye(len(x))]
    assert (torch.tensor(slopes) - expected).norm() <= 1e-6 * expected.norm()
    assert inner.lower is not None
    meta = UpperStep([x], lower=inner.lower)
    inner.solve()
    meta.step(inner.validation_loss)
    assert x.grad is not None and (x.grad - expected).norm() <= 1e-5 * expected.norm()


def test_imaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTIVE_BILEVEL_DATA", raising=False)
    monkeypatch.setattr(torchopt_imaml, "TEST_TASKS", 2)
    torch.set_default_dtype(torch.float32)  # as a script starts; the next test sets its own
    figure, output = tmp_path / "imaml.png", tmp_path / "imaml.json"
    arguments = ["--iterations", "2", "--first-trials", "none", "1", "--adam", "1e-3"]
    torchopt_imaml.main([*arguments, "--figure", str(figure), "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    names = ["BiSLS-SGD none", "BiSLS-SGD 1", "Adam 0.001", "Adam above AutoSLS 0.001"]
    assert [run["name"] for run in runs] == names
    assert all(0.0 <= run["final"] <= 1.0 for run in runs) and runs[0]["steps"][0] > 0.0
    assert figure.stat().st_size > 1000


def test_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", torch.autograd.grad)  # it times these, for the process's life
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    for name in ("BiSLS, adam / SLS", "BiSPS / SPSB"):
        monkeypatch.delitem(torchopt_overhead.CASES, name)
    torch.set_default_dtype(torch.float32)  # as a script starts
    output = tmp_path / "a.json"
    torchopt_overhead.main(["--repeats", "1", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert all(row["step"] >= row["evaluations"] >= row["of which the hypergradient"] > 0 for row in rows.values())
    assert 1.0 <= rows["BiSLS / SLS"]["peak ratio"] <= 1.1
