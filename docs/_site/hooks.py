"""Pages of the site that are made at build time, links that leave `docs/`, and the markup of docstrings.

* A page for each file of `examples/benchmarks/results/` that the suite has written, by the suite's own tables.
* Whatever a page links to outside `docs/` is a part of the site, under `repository/`.
* Docstrings are plain text with doctests: these become blocks of code, and stars and angle brackets stay what they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import griffe  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

import tables  # noqa: E402

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]+)?\)")
CODE = re.compile(r"(```.*?^```$|``.+?``|`[^`]+`|\$\$.+?\$\$|\$[^$\n]+\$)", re.MULTILINE | re.DOTALL)
DOCTEST = re.compile(r"^( *)>>> .*\n(?:\1\S.*(?:\n|\Z)|\1 +\S.*(?:\n|\Z))*", re.MULTILINE)
COPIED = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/benchmarks/EVIDENCE.md")
"""Files that the navigation lists; others follow from the links."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of results, and all files that pages link to outside `docs/`."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "title" in content:
            files.append(File.generated(config, f"results/{path.stem}.md", content=result(path.stem, content)))
            picture = path.with_suffix(".png")
            files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    todo = [(file.src_uri, f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    for name in COPIED:
        todo += include(files, name, config)
    while todo:
        uri, home, text = todo.pop()
        if not uri.startswith("results/"):
            for _, target, _ in LINK.findall(text):
                linked = resolve(home, target)
                if linked is not None and (ROOT / linked).is_file():
                    todo += include(files, linked, config)
    return files


def include(files: Files, name: str, config: Any) -> list[tuple[str, str, str]]:
    """Add a file of the repository to the site; return it if its links are to be followed."""
    uri = place(name)
    if files.get_file_from_path(uri) is not None:
        return []
    files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return [(uri, name, (ROOT / name).read_text())] if name.endswith(".md") else []


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave `docs/` into links within the site; a folder is named without a link."""
    uri = page.file.src_uri
    home = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"

    def replace(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        name = resolve(home, target)
        if name is None or uri.startswith("results/"):
            return match[0]
        if not (ROOT / name).is_file():
            return words if name in words or words.startswith("`") else f"{words} (`{name}`)"
        return f"[{words}]({os.path.relpath(place(name), PurePosixPath(uri).parent)}{anchor or ''})"

    return verbatim(LINK.sub(replace, markdown))


def resolve(home: str, target: str) -> str | None:
    """Return the path of a link's target in the repository; None for addresses and for links within `docs/`."""
    if "://" in target or target.startswith("mailto:"):
        return None
    name = os.path.normpath(PurePosixPath(home).parent / target)
    return None if home.startswith("docs/") and name.startswith("docs/") else name


def place(name: str) -> str:
    """Return where a file of the repository is on the site."""
    path = ROOT / name
    if path.parent == RESULTS and path.suffix == ".json" and '"title"' in path.read_text():
        return f"results/{path.stem}.md"
    return (
        name.removeprefix("docs/")
        if name.startswith("docs/")
        else "index.md"
        if name == "README.md"
        else f"repository/{name}"
    )


def result(name: str, content: dict[str, Any]) -> str:
    """Return the page of a file that the suite has written."""
    settings = ", ".join(f"{key} = {value}" for key, value in content["settings"].items())
    commits = content["core_commit"]
    commits = ", ".join(f"`{commit}`" for commit in ([commits] if isinstance(commits, str) else commits))
    kinds = {
        "ours": "No number at either level",
        "grid": "The best points of the grids",
        "other": "Other methods",
        "first trial": "First trials, or bounds",
    }
    parts = [f"# {name}", content["title"] + ".", f"```sh\n{content['command']}\n```"]
    parts.append(f"Data: {content['data']}. Commits of the package: {commits}. Settings: {settings}.")
    renewed = ", ".join(sorted({f"`{row['core_commit']}`" for row in content["rows"] if "core_commit" in row}))
    if renewed:
        parts.append(f"BiSLS was run again alone, with {renewed}. The picture is of the first run.")
    parts.append(f"![Loss against iterations, and the final loss of each method]({name}.png)")
    for kind, words in kinds.items():
        rows = [row for row in content["rows"] if row["kind"] == kind]
        if rows:
            parts += [f"## {words}", tables.text(rows)]
    if content["bars"]:
        parts += ["## Bars", tables.bars(content["bars"])]
    return "\n\n".join(parts) + "\n"


def verbatim(text: str) -> str:
    """Escape the stars of ``y*(x)`` and what looks like a tag, as ``<g, d>``, outside of code and formulas."""
    parts = CODE.split(text)
    parts[::2] = [
        re.sub(r"<(?=[A-Za-z][^<>]*, )", "&lt;", re.sub(r"(?<=\w)\*(?=\()", r"\\*", part)) for part in parts[::2]
    ]
    return "".join(parts)


class Docstrings(griffe.Extension):
    """Make Markdown of a docstring's plain text; find functions that have the name of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self._of_packages: list[griffe.Function] = []

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Remember the functions of packages."""
        if func.parent is not None and func.parent.is_init_module:
            self._of_packages.append(func)

    def on_package(self, **_: Any) -> None:
        """Put a function that a submodule of the same name hides into that submodule."""
        for func in self._of_packages:
            module = func.parent.members.get(func.name) if func.parent is not None else None
            if isinstance(module, griffe.Module) and func.name not in module.members:
                module.set_member(func.name, func)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Mark the doctests of an object's docstring as code."""
        if obj.docstring is not None:

            def fence(match: re.Match[str]) -> str:
                code = re.sub(r" *# doctest: .*", "", match[0].rstrip("\n"))
                return f"{match[1]}```pycon\n{code}\n{match[1]}```\n"

            obj.docstring.value = verbatim(DOCTEST.sub(fence, obj.docstring.value))
