"""`data.py --download` writes what the benchmarks read, with scikit-learn's download replaced by a stub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

import numpy as np
import sklearn.datasets
from scipy.sparse import csr_matrix

import data


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are asked for; images have 12 rows, tables have 7, of which so many are for training."""
    names: list[str] = []
    random = np.random.default_rng(0)

    def fetch(name: str, **options: Any) -> SimpleNamespace:
        assert options["version"] == 1
        names.append(name)
        if "mnist" in name.lower():
            return SimpleNamespace(data=random.integers(0, 256, (12, 784)).astype(float), target=np.array(["3"] * 12))
        values = (random.random((7, 5)) < 0.4).astype(float)
        return SimpleNamespace(data=csr_matrix(values), target=np.array(["-1", "1", "1", "-1", "1", "-1", "1"]))

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    small = {name: (title, 10 if "mnist" in name else 4, 1) for name, (title, _, _) in data.DOWNLOADS.items()}
    monkeypatch.setattr(data, "DOWNLOADS", small)
    return names


def test_what_is_written_is_read(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main(["--download", str(tmp_path)])
    assert asked == ["mnist_784", "Fashion-MNIST", "a9a", "w8a"]
    assert "mnist_784 of openml.org, about 1 MB" in capsys.readouterr().out
    for name in ("mnist", "fashion_mnist"):
        images = data.images(str(tmp_path), name)
        assert images.x.shape == (10, 14, 14) and images.test_x.shape == (2, 14, 14)
        assert images.y.tolist() == [3] * 10
    for name in ("a9a", "w8a"):
        (x, y), test = data.classification(name, str(tmp_path))
        assert x.shape == (4, 5) and y.tolist() == [-1, 1, 1, -1]
        assert test is not None and test[0].shape == (3, 5)
        assert torch.equal(x, (x != 0).float())


def test_what_is_there_is_kept(asked: list[str], tmp_path: Path) -> None:
    data.download(tmp_path, ["a9a"])
    data.main(["--download", str(tmp_path), "--only", "a9a"])
    assert asked == ["a9a"]
