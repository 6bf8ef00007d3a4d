"""Where a host is not installed, its tests and the doctests of its integration are left out."""

from __future__ import annotations

from importlib.util import find_spec

FOLDERS = {
    "torchopt": ["tests/torchopt", "tests/test_warnings.py", "integrations/adaptive_bilevel_torchopt"],
    "betty": ["tests/betty", "tests/test_warnings.py", "integrations/adaptive_bilevel_betty"],
}
ABSENT = [host for host in FOLDERS if find_spec(host) is None]

collect_ignore = [folder for host in ABSENT for folder in FOLDERS[host]]


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"{host} is not installed: without {', '.join(FOLDERS[host])}" for host in ABSENT]
