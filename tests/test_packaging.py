"""What a user installs: the wheel, its imports, its version; and what must not be in the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import adaptive_bilevel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = [Path(folder) for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
NAMES = {folder.name for folder in SHIPPED}


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; with the hatchling that is installed, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(code: str, installed: Path, *flags: str) -> str:
    """Run code on the installed wheel, from outside the checkout and ahead of an editable install."""
    return run(sys.executable, *flags, "-c", code, cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)})


def modules(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.py")}


def test_changelog_and_citation_name_the_version() -> None:
    """The newest release is below the heading that takes the next lines."""
    changes, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", changes, re.MULTILINE)
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", citation, re.MULTILINE))
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (cited["version"], cited["date-released"])
    assert cited["version"] == adaptive_bilevel.__version__


def test_wheel_has_the_listed_packages_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert top == NAMES
    for folder in SHIPPED:
        assert modules(installed / folder.name) == modules(ROOT / folder)
        assert (installed / folder.name / "py.typed").is_file()


def test_sdist_has_what_a_checkout_has(tmp_path: Path) -> None:
    """Enough to run the tests and build the site, and nothing that the commands have made."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        top = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"adaptive_bilevel", "integrations", "tests", "docs", "examples", "mkdocs.yml", "Makefile"} <= top
    assert not top & {".venv", "site", "benchmark-runs", "demo.png", "dist", "build"}


def test_wheel_imports_outside_the_checkout(installed: Path) -> None:
    absent = {f"adaptive_bilevel_{host}" for host in ("torchopt", "betty") if importlib.util.find_spec(host) is None}
    for name in sorted(NAMES - absent):
        assert Path(python(f"import {name}; print({name}.__file__)", installed).strip()).is_relative_to(installed)


def test_policies_import_no_framework(installed: Path) -> None:
    python("import adaptive_bilevel.policies, sys; assert 'torch' not in sys.modules", installed)
    python("import adaptive_bilevel.policies", installed, "-S")  # without site-packages: the standard library is enough


def test_version_has_one_source(wheel: Path, installed: Path) -> None:
    version = adaptive_bilevel.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert Parser().parsestr(metadata.read_text())["Version"] == version
    assert wheel.name.split("-")[1] == version
    texts = [path.read_text() for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")]
    assert sum(f'"{version}"' in text for text in [*texts, (ROOT / "pyproject.toml").read_text()]) == 1


def imports(path: Path) -> set[str]:
    """Return the absolute names that a file imports, at any depth of its code."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else ()), node.module or ""])
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


HOSTS = ["torchopt", "betty", "adaptive_bilevel_torchopt", "adaptive_bilevel_betty"]
CORE = ("errors", "policies", "evaluation", "hypergradient", "optim", "bilevel", "methods")
SEES: dict[str, tuple[str, ...]] = {
    "errors": (),
    "policies": ("errors",),
    "evaluation": ("errors",),
    "hypergradient": ("errors", "policies", "evaluation"),
    "optim": ("errors", "policies", "evaluation"),
    "bilevel": ("errors", "policies", "evaluation", "hypergradient", "optim"),
    "methods": ("errors", "policies", "evaluation", "hypergradient", "optim", "bilevel"),
}
"""Which parts of the core a part imports; none sees the two hosts, nor those in the row below it."""


def forbidden(folder: str) -> list[str]:
    return [f"adaptive_bilevel.{part}" for part in CORE if part not in (folder, *SEES[folder])]


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("adaptive_bilevel", [*HOSTS, "jax", "numpy", "examples", "tests", "integrations"]),
        ("adaptive_bilevel/policies", ["torch"]),
        *((f"adaptive_bilevel/{part}", forbidden(part)) for part in CORE[1:]),
        ("integrations/adaptive_bilevel_torchopt", ["betty", "adaptive_bilevel_betty", "adaptive_bilevel.methods"]),
        ("integrations/adaptive_bilevel_betty", ["torchopt", "adaptive_bilevel_torchopt", "adaptive_bilevel.methods"]),
    ],
)
def test_arrows_point_one_way(folder: str, banned: list[str]) -> None:
    """Late imports included."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if any(name == ban or name.startswith(f"{ban}.") for ban in banned)
    }
    assert not wrong


PACKAGES = [ROOT / "adaptive_bilevel", *(ROOT / "integrations").glob("adaptive_bilevel_*")]
SOURCES = [path for package in PACKAGES for path in package.rglob("*.py")]


def test_no_private_name_crosses_a_folder() -> None:
    wrong = set()
    for path in SOURCES:
        home = ".".join(path.relative_to(ROOT).parent.parts).removeprefix("integrations.")
        for name in imports(path):
            own, *parts = name.split(".")[0], *name.split(".")
            private = [i for i, part in enumerate(parts) if part.startswith("_") and part != "__future__"]
            if own.startswith("adaptive_bilevel") and private and ".".join(parts[: private[0]]) != home:
                wrong.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_files_hold_one_idea_each() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long


def test_everything_that_is_installed_is_pinned() -> None:
    pytest.importorskip("torchopt")  # a part of the extra dev
    lines = [line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {normal(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    if f"torch=={importlib.metadata.version('torch').split('+')[0]}" not in lines:
        pytest.skip("another torch than the pinned one brings other packages along")
    wanted = {normal(name) for name in ("adaptive-bilevel", "pip")}
    needed = closure("adaptive-bilevel", {"dev"}, set())
    assert needed - wanted <= pins


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: set[str], seen: set[str]) -> set[str]:
    """Return the distributions that an installed one needs in this environment, itself included."""
    from packaging.requirements import Requirement

    seen.add(normal(name))
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""})
        if wanted and (normal(requirement.name) not in seen or requirement.extras):
            closure(requirement.name, requirement.extras, seen)
    return seen


def test_ci_tries_every_python_that_is_promised() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tried = re.search(r"^ *python: \[(.*)\]$", workflow, re.MULTILINE)
    promised = [line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert tried is not None and [version.strip(' "') for version in tried[1].split(",")] == promised


def test_the_oldest_torch_that_is_promised_is_tried() -> None:
    (floor,) = re.findall(r"^torch>=([\d.]+)$", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE)
    (tried,) = re.findall(r"^OLDEST_TORCH := ([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tried.startswith(f"{floor}.")


def test_no_path_of_a_machine_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folders = "|".join(["work", "root", "home", "Users"])
    machine = re.compile(rf"(?<![\w.~}}-])/(?:{folders})/".encode())
    found = []
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix != ".png":
            lines = enumerate(path.read_bytes().splitlines(), 1)
            found += [f"{name}:{number}" for number, line in lines if machine.search(line)]
    assert not found
