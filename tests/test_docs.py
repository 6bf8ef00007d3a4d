"""The pages for readers: programs run and print what they say, links lead somewhere, the API has every public name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import pages
import tables

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "integrations").rglob("*.md")),
    ]
}
SITE = (ROOT / "mkdocs.yml").read_text()
LANGUAGES = {"", "python", "text", "diff", "sh"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, in order: language and text."""
    return pages.blocks(PAGES[page])


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if any(kind == language for kind, _ in blocks(page))]


def numbers_and_words(text: str) -> tuple[list[float], str]:
    pattern = r"\d+\.\d+"
    return [float(number) for number in re.findall(pattern, text)], re.sub(pattern, "#", text)


def test_every_fence_has_a_known_language() -> None:
    """A block that is called something else would be tested by nothing."""
    assert {(page, kind) for page in PAGES for kind, _ in blocks(page) if kind not in LANGUAGES} == set()
    assert all(PAGES[page].count("```") == 2 * len(blocks(page)) for page in PAGES)


@pytest.mark.parametrize("page", pages_with("python"))
def test_programs_run_in_order_and_print_what_stands_below(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python blocks of a page are one program; a block of text after one is what it prints.

    The programs of `docs/examples` run at a reduced size, at which their numbers are others.
    """
    monkeypatch.chdir(tmp_path)  # for pictures
    torch.set_default_dtype(torch.float32)  # as a script starts; the next test sets its own
    shortened = page.startswith("docs/examples")
    if shortened:
        pytest.importorskip("sklearn")
    text = pages.reduced(PAGES[page]) if shortened else PAGES[page]
    for _, printed, below in pages.outputs(text, page):
        if below is not None and not shortened:
            values, words = numbers_and_words(printed)
            expected, expected_words = numbers_and_words(below)
            assert words == expected_words
            assert values == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("page", pages_with("diff"))
@pytest.mark.parametrize("sign", ["-", "+"])
def test_both_sides_of_a_diff_are_python(page: str, sign: str) -> None:
    for kind, text in blocks(page):
        if kind == "diff":
            side = "\n".join(line[1:] for line in text.splitlines() if not line or line[0] in (" ", sign))
            compile(re.sub(r"^( *)(def .*:)$\n(?!\1 )", r"\1\2\n\1    pass\n", side, flags=re.MULTILINE), page, "exec")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", pages.FENCE.sub("", PAGES[page])):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/]+\.md)$", SITE, re.MULTILINE))
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} <= listed
    for name in listed:
        assert (ROOT / "docs" / name).is_file() or (ROOT / name.removeprefix("repository/")).is_file()


def test_the_readme_is_short_and_its_program_is_the_quick_start() -> None:
    assert len(PAGES["README.md"].split()) <= 900
    program = next(text for kind, text in blocks("README.md") if kind == "python")
    assert program == (ROOT / "examples" / "quickstart" / "plain_pytorch.py").read_text()


def test_the_commands_of_make_exist() -> None:
    commands = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= commands, page


def test_the_scripts_that_pages_name_exist() -> None:
    for page, text in PAGES.items():
        scripts = set(re.findall(r"python (examples/[\w/]+\.py)", text))
        assert not {script for script in scripts if not (ROOT / script).is_file()}, page


def test_the_table_of_all_tasks_is_that_of_the_results() -> None:
    marked = tables.MARKED.search(PAGES["docs/benchmarks.md"])
    assert marked is not None and tables.overview() in marked[0], "run python examples/benchmarks/tables.py"


PUBLIC = [
    "adaptive_bilevel",
    "adaptive_bilevel.bilevel",
    "adaptive_bilevel.errors",
    "adaptive_bilevel.evaluation",
    "adaptive_bilevel.hypergradient",
    "adaptive_bilevel.methods",
    "adaptive_bilevel.optim",
    "adaptive_bilevel.policies",
    "adaptive_bilevel_betty",
    "adaptive_bilevel_torchopt",
]


def folder(module: str) -> Path:
    return ROOT / ("integrations" if module.startswith("adaptive_bilevel_") else "") / module.replace(".", "/")


def exported(module: str) -> list[str]:
    """Return `__all__` of a module, from its source: no host is imported."""
    path = folder(module)
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    listed = re.search(r"^__all__ = (\[.*?\])$", source.read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    names: list[str] = ast.literal_eval(listed[1])
    return names


def addresses(module: str, name: str) -> set[str]:
    """Return where a page of the API may have a name; a name that a submodule has too is found in that."""
    if module == "adaptive_bilevel":
        return {f"{module}.{home}.{name}" for home in ("optim", "bilevel")}
    return {f"{module}.{name}.{name}" if (folder(module) / f"{name}.py").is_file() else f"{module}.{name}"}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page_of_the_api(module: str) -> None:
    listed = [
        name for page in PAGES if page.startswith("docs/api/") for name in re.findall(r"^::: (\S+)", PAGES[page], re.M)
    ]
    assert len(listed) == len(set(listed))
    missing = [name for name in exported(module) if not addresses(module, name) & set(listed)]
    missing = [name for name in missing if not (folder(module) / name / "__init__.py").is_file()]
    assert not missing


@pytest.mark.parametrize("module", [module for module in PUBLIC if not module.startswith("adaptive_bilevel_")])
def test_every_public_name_has_a_docstring(module: str) -> None:
    of = importlib.import_module(module)
    objects = {name: getattr(of, name) for name in exported(module)}
    undocumented = {
        n for n, o in objects.items() if inspect.isclass(o) or inspect.isfunction(o) if not inspect.getdoc(o)
    }
    assert not undocumented
