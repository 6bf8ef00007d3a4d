"""What every test starts from: float64, one thread, fixed seeds, and the real data if there is any."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

try:
    import torch
except ImportError:  # the policies, and so their tests, do without it (make test-policies)
    torch = None  # type: ignore[assignment]
else:
    torch.set_num_threads(1)

SEED = 0

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        metavar="DIR",
        default=os.environ.get("ADAPTIVE_BILEVEL_DATA"),
        help="folder of real data sets (mnist_train.npz, w8a.npz, ...); default: $ADAPTIVE_BILEVEL_DATA",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") and data_folder(item.config) is None:
        pytest.skip("needs real data: --data DIR or ADAPTIVE_BILEVEL_DATA")
    if item.get_closest_marker("device") and accelerator() is None:
        pytest.skip("needs an accelerator")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes: --slow")


def data_folder(config: pytest.Config) -> Path | None:
    """Return the folder of real data, or None where none was named. A folder that was named has to be there."""
    named = config.getoption("--data")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise pytest.UsageError(f"--data (or ADAPTIVE_BILEVEL_DATA) names no folder: {named}")
    return folder


def accelerator() -> torch.device | None:
    """Return the machine's accelerator, or None."""
    return torch.accelerator.current_accelerator(check_available=True) if torch else None


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Give each test float64 and fresh, fixed random streams, and take its defaults back."""
    random.seed(SEED)
    np.random.seed(SEED)
    if torch is None:
        yield
        return
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(SEED)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def data_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of real data; the test is skipped without one."""
    folder = data_folder(pytestconfig)
    if folder is None:
        pytest.skip("needs real data: --data DIR or ADAPTIVE_BILEVEL_DATA")
    return folder


@pytest.fixture
def device() -> torch.device:
    """The machine's accelerator; the test is skipped without one."""
    found = accelerator()
    if found is None:
        pytest.skip("needs an accelerator")
    return found
