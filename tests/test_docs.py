"""The pages for readers: programs run and print what they say, diffs are Python, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"", "python", "text", "diff", "sh"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, in order: language and text."""
    return FENCE.findall(PAGES[page])


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
def test_programs_run_in_order_and_print_what_stands_below(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python blocks of a page are one program; a block of text after one is what it prints."""
    torch.set_default_dtype(torch.float32)  # as a script starts; the next test sets its own
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page, "exec"), names)
            printed = capsys.readouterr().out
        elif kind == "text" and printed is not None:
            values, words = numbers_and_words(printed)
            expected, expected_words = numbers_and_words(text)
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
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", PAGES["README.md"]))
    assert {page for page in PAGES if not page.startswith(("README", "integrations"))} <= linked


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
