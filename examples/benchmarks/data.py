"""Data sets of the benchmarks: NumPy archives from a folder that the user names, or a small stand-in without one.

The folder is given by ``--data DIR`` or by the environment variable ``ADAPTIVE_BILEVEL_DATA``. Images are read from
``NAME_train.npz`` and ``NAME_test.npz`` (keys ``images``, ``labels``) or from MNIST's four original idx files, plain or
gzipped. Sparse classification sets are read from ``NAME.npz`` in CSR form (keys ``indptr``, ``indices``, ``data``,
``shape``, ``y``; prefixed by ``train_`` and ``test_`` where there are two parts). Everything is read once.

Without a folder, images are scikit-learn's digits and the other sets are generated: enough to run every benchmark, and
another problem, so results say which it was.

    python examples/benchmarks/data.py --download DIR [--only mnist a9a ...]

fetches MNIST, Fashion-MNIST, a9a and w8a from openml.org into DIR, by scikit-learn. The other sets are not there.
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

VARIABLE = "ADAPTIVE_BILEVEL_DATA"
STANDARD = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}  # mean, standard deviation of the pixels
ROWS = 25_000  # of the training images: more are not used
PARTS = ("train", "test")
Part = tuple[Tensor, Tensor]
DOWNLOADS = {  # name on openml.org (version 1), rows for training (the others are for tests), MB to download
    "mnist": ("mnist_784", 60_000, 15),
    "fashion_mnist": ("Fashion-MNIST", 60_000, 30),
    "a9a": ("a9a", 32_561, 1),
    "w8a": ("w8a", 49_749, 1),
}


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


@cache
def images(given: str | Path | None = None, name: str = "mnist", *, pooled: bool = True) -> Images:
    """MNIST or Fashion-MNIST from the data folder, or scikit-learn's digits when no folder is named.

    A folder that has Fashion-MNIST's test part only serves its first 8,000 images for training and the rest for tests.

    Args:
        given: the folder; None looks at the environment variable.
        name: "mnist", "fashion_mnist", or "digits", which need no folder.
        pooled: average over 2x2 blocks, which gives 14x14; else 28x28. Digits are 8x8, or are resized to 28x28.

    Raises:
        FileNotFoundError: a folder is named and holds no such set.
    """
    where = folder(given)
    if where is None or name == "digits":
        return _digits(pooled)
    mean, deviation = STANDARD[name]

    def standardise(x: np.ndarray) -> Tensor:
        scaled = (torch.from_numpy(x.copy()).float() / 255 - mean) / deviation
        return torch.nn.functional.avg_pool2d(scaled[:, None], 2)[:, 0] if pooled else scaled

    test_x, test_y = _image_part(where, name, "test")
    if name == "fashion_mnist" and not (where / f"{name}_train.npz").exists():
        (x, test_x), (y, test_y) = np.split(test_x, [8000]), np.split(test_y, [8000])
    else:
        x, y = _image_part(where, name, "train")
    return Images(name, standardise(x[:ROWS]), _labels(y[:ROWS]), standardise(test_x), _labels(test_y))


@cache
def classification(name: str, given: str | Path | None = None) -> tuple[Part, Part | None]:
    """A binary set (w8a, a9a, mushrooms, phishing, ijcnn1): dense float32 rows, labels -1 / +1; train, test if any."""
    where = folder(given)
    if where is None:
        return _generated_rows(seed=0), _generated_rows(seed=1, rows=500)
    with np.load(_existing(where / f"{name}.npz")) as archive:
        two = "train_indptr" in archive
        train = _dense(archive, "train_" if two else "")
        return _signed(train), _signed(_dense(archive, "test_")) if two else None


@cache
def words(name: str = "news20_small", given: str | Path | None = None) -> tuple[Part, Part]:
    """Word counts of posts in 20 groups, rows of length 1 (dense float32), and the group; train and test."""
    where = folder(given)
    if where is None:
        return _generated_words(seed=1), _generated_words(seed=2, rows=200)
    with np.load(_existing(where / f"{name}.npz")) as archive:
        parts = [_dense(archive, prefix) for prefix in ("train_", "test_")]
    train, test = ((torch.nn.functional.normalize(torch.from_numpy(x)), _labels(y)) for x, y in parts)
    return train, test


@cache
def characters(given: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Drawings by character for few-shot learning, (characters, drawings, height, width): for training, for tests.

    Omniglot pooled to 14x14, whose last 60 characters are for tests; or digits, of which 5 to 9 are.
    """
    where = folder(given)
    if where is None:
        content = _digits(pooled=True)
        smallest = min(int((content.y == digit).sum()) for digit in range(10))
        drawings = torch.stack([content.x[content.y == digit][:smallest] for digit in range(10)])
        return drawings[:5], drawings[5:]
    with np.load(_existing(where / "omniglot_small.npz")) as archive:
        drawings = torch.from_numpy(archive["images"]).float() / 255
    drawings = torch.nn.functional.avg_pool2d(drawings, 2)
    drawings = (drawings - drawings.mean()) / drawings.std()
    return drawings[:-60], drawings[-60:]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; name another folder, or none (see data.py).")
    return path


@cache
def _digits(pooled: bool) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))  # the set comes grouped by writer
    x = torch.from_numpy(bunch.images[order]).float()
    y = _labels(bunch.target[order])
    x = (x - x.mean()) / x.std()
    if not pooled:
        x = torch.nn.functional.interpolate(x[:, None], (28, 28), mode="bilinear")[:, 0]
    return Images("digits", x[:1500], y[:1500], x[1500:], y[1500:])


def _generated_rows(seed: int, rows: int = 2000, columns: int = 60) -> Part:
    """Sparse rows of zeros and ones and noisy labels of one linear rule, the same for every seed."""
    rule = np.random.default_rng(100).normal(size=columns)
    random = np.random.default_rng(seed)
    x = (random.random((rows, columns)) < 0.2).astype(np.float32)
    y = np.where(x @ rule + random.normal(size=rows) > 0, 1, -1)
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))


def _generated_words(seed: int, rows: int = 400, columns: int = 200, groups: int = 20) -> Part:
    preferred = np.random.default_rng(100).dirichlet(np.full(columns, 0.1), size=groups)
    random = np.random.default_rng(seed)
    y = random.integers(groups, size=rows)
    x = np.stack([random.multinomial(60, 0.5 * preferred[group] + 0.5 / columns) for group in y])
    return torch.nn.functional.normalize(torch.from_numpy(x).float()), _labels(y)


def _dense(archive: np.lib.npyio.NpzFile, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    indptr, indices, values = (archive[prefix + key] for key in ("indptr", "indices", "data"))
    rows, columns = (int(size) for size in archive[prefix + "shape"])
    x = np.zeros((rows, columns), np.float32)
    x[np.repeat(np.arange(rows), np.diff(indptr)), indices] = values
    return x, archive[prefix + "y"]


def _signed(part: tuple[np.ndarray, np.ndarray]) -> Part:
    return torch.from_numpy(part[0]), torch.from_numpy(part[1].astype(np.float32))


def _image_part(where: Path, name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    archive = where / f"{name}_{part}.npz"
    if archive.exists() or name != "mnist":
        with np.load(_existing(archive)) as content:
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


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))


# Downloads.


def download(where: Path, names: Sequence[str] = ()) -> None:
    """Fetch data sets from openml.org into a folder, in the form that is read above; what is there is kept.

    Args:
        where: the folder, which is made.
        names: some of `DOWNLOADS`; all of them if empty.
    """
    from scipy.sparse import csr_matrix
    from sklearn.datasets import fetch_openml

    where.mkdir(parents=True, exist_ok=True)
    for name in tqdm(names or DOWNLOADS, unit="data set", disable=None):
        title, rows, size = DOWNLOADS[name]
        files = [where / f"{name}_{part}.npz" for part in PARTS] if name in STANDARD else [where / f"{name}.npz"]
        if all(file.exists() for file in files):
            tqdm.write(f"{name}: already in {where}")
            continue
        tqdm.write(f"{name}: {title} of openml.org, about {size} MB ...")
        bunch = fetch_openml(title, version=1, as_frame=False, parser="liac-arff")
        parts = slice(0, rows), slice(rows, None)
        if name in STANDARD:
            x, y = np.asarray(bunch.data, np.uint8).reshape(-1, 28, 28), np.asarray(bunch.target, np.int64)
            for file, part in zip(files, parts, strict=True):
                np.savez_compressed(file, images=x[part], labels=y[part])
        else:
            x, y = csr_matrix(bunch.data, dtype=np.float32), np.asarray(bunch.target, np.float64).astype(np.int8)
            table: dict[str, Any] = {}
            for prefix, part in zip(PARTS, parts, strict=True):
                table |= {f"{prefix}_{key}": getattr(x[part], key) for key in ("indptr", "indices", "data", "shape")}
                table[f"{prefix}_y"] = y[part]
            np.savez_compressed(files[0], **table)
        tqdm.write(f"  wrote {', '.join(file.name for file in files)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", type=Path, metavar="DIR", required=True, help="the folder to fetch into")
    parser.add_argument("--only", nargs="+", choices=DOWNLOADS, metavar="NAME", default=(), help=", ".join(DOWNLOADS))
    options = parser.parse_args(arguments)
    download(options.download, options.only)


if __name__ == "__main__":
    main()
