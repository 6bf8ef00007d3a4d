"""Data sets of the benchmarks: NumPy archives from a folder that the user names, or scikit-learn's digits.

The folder is given by ``--data DIR`` or by the environment variable ``ADAPTIVE_BILEVEL_DATA``. Images are read from
``mnist_train.npz`` and ``mnist_test.npz`` (keys ``images``, ``labels``) or from the four original idx files, plain or
gzipped. Sparse classification sets are read from ``NAME.npz`` in CSR form (keys ``indptr``, ``indices``, ``data``,
``shape``, ``y``; prefixed by ``train_`` where there are two parts).
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VARIABLE = "ADAPTIVE_BILEVEL_DATA"
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


@dataclass(frozen=True)
class Images:
    """A labelled image set: `x` is float32, standardised, of shape (n, height, width); `y` is int64."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def folder(given: str | Path | None = None) -> Path | None:
    """The data folder: the one that is given, else the environment's, else None."""
    chosen = given or os.environ.get(VARIABLE)
    return Path(chosen) if chosen else None


def images(given: str | Path | None = None, *, pooled: bool = True) -> Images:
    """MNIST from the data folder, or scikit-learn's digits when no folder is named.

    Args:
        given: the folder; None looks at the environment variable.
        pooled: average MNIST over 2x2 blocks, which gives 14x14 (digits are 8x8 and stay as they are).

    Raises:
        FileNotFoundError: a folder is named and holds no MNIST.
    """
    where = folder(given)
    if where is None:
        return _digits()
    (x, y), (test_x, test_y) = _mnist_part(where, "train"), _mnist_part(where, "test")
    return Images("mnist", _standardise(x, pooled), _labels(y), _standardise(test_x, pooled), _labels(test_y))


def classification(name: str, given: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """A binary set (w8a, a9a, mushrooms, phishing, ijcnn1, ...): a dense float32 matrix and labels -1 / +1."""
    where = folder(given)
    if where is None:
        raise FileNotFoundError(f"{name} is not shipped: name a folder with {name}.npz by --data or {VARIABLE}.")
    with np.load(where / f"{name}.npz") as archive:
        prefix = "train_" if "train_indptr" in archive else ""
        indptr, indices, values = (archive[prefix + key] for key in ("indptr", "indices", "data"))
        rows, columns = (int(size) for size in archive[prefix + "shape"])
        y = archive[prefix + "y"].astype(np.float32)
    x = np.zeros((rows, columns), np.float32)
    x[np.repeat(np.arange(rows), np.diff(indptr)), indices] = values
    return torch.from_numpy(x), torch.from_numpy(y)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))  # the set comes grouped by writer
    x = torch.from_numpy(bunch.images[order]).float()
    y = _labels(bunch.target[order])
    x = (x - x.mean()) / x.std()
    return Images("digits", x[:1500], y[:1500], x[1500:], y[1500:])


def _mnist_part(where: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    archive = where / f"mnist_{part}.npz"
    if archive.exists():
        with np.load(archive) as content:
            return content["images"], content["labels"]
    stem = "train" if part == "train" else "t10k"
    return _idx(where, f"{stem}-images-idx3-ubyte", 16).reshape(-1, 28, 28), _idx(where, f"{stem}-labels-idx1-ubyte", 8)


def _idx(where: Path, name: str, header: int) -> np.ndarray:
    for path in (where / name, where / f"{name}.gz"):
        if path.exists():
            raw = path.read_bytes()
            return np.frombuffer(gzip.decompress(raw) if path.suffix == ".gz" else raw, np.uint8, offset=header)
    raise FileNotFoundError(
        f"no MNIST in {where}: expected mnist_train.npz, mnist_test.npz or idx files ({name}[.gz])."
    )


def _standardise(x: np.ndarray, pooled: bool) -> Tensor:
    scaled = (torch.from_numpy(x.copy()).float() / 255 - MNIST_MEAN) / MNIST_STD
    return torch.nn.functional.avg_pool2d(scaled[:, None], 2)[:, 0] if pooled else scaled


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))
