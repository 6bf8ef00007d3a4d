"""What is installed: TorchOpt is needed, Betty is not."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_without_torchopt_importing_says_what_to_install() -> None:
    done = run("import sys; sys.modules['torchopt'] = None; import adaptive_bilevel_torchopt")
    assert done.returncode != 0
    assert "ImportError: adaptive_bilevel_torchopt needs TorchOpt" in done.stderr
    assert "pip install 'adaptive-bilevel[torchopt]'" in done.stderr


def test_a_torchopt_that_does_not_import_says_why() -> None:
    """Where a later torch ships no functorch, installing TorchOpt again is no help."""
    done = run("import sys; sys.modules['functorch'] = None; import adaptive_bilevel_torchopt")
    assert done.returncode != 0 and "pip install" not in done.stderr
    assert "TorchOpt is installed, but importing it failed" in done.stderr and "functorch" in done.stderr


def test_betty_is_not_needed() -> None:
    forbidden = "import sys; sys.modules['betty'] = None; import adaptive_bilevel_torchopt; "
    done = run(forbidden + "print(sorted(name for name in sys.modules if 'betty' in name))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['betty']"
