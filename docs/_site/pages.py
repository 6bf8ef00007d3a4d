"""Programs on the pages of the site: their blocks, and a command that runs a page and writes what it prints.

    python docs/_site/pages.py docs/examples/weight_decay.md ...

The Python blocks of a page are one program. A block of text that follows a Python block is what it prints. Pictures are
saved in the folder `docs/assets/examples`, which is the working folder of the program.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURES = Path(__file__).parents[1] / "assets" / "examples"
REDUCED = {"STEPS": "2", "LOWER_STEPS": "2", "LOWER": "(0.1,)", "UPPER": "(0.1,)", "EPISODES": "2", "ROWS": "60"}
"""Sizes of a program that the tests run in place of the page's own, which stand in lines ``NAME = value``."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, in order: language and text."""
    return FENCE.findall(text)


def reduced(code: str) -> str:
    """Return a program with the sizes of the tests."""
    for name, size in REDUCED.items():
        code = re.sub(rf"^{name} = [^#\n]*", f"{name} = {size}  ", code, flags=re.MULTILINE)
    return code


def outputs(text: str, page: str = "page") -> Iterator[tuple[str, str, str | None]]:
    """Run the Python blocks of a page in order; yield each with its output and the block of text below it, if any."""
    names: dict[str, object] = {"__name__": "__main__"}
    found = [*blocks(text), ("", "")]
    for (kind, code), (next_kind, below) in itertools.pairwise(found):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page, "exec"), names)
            yield code, printed.getvalue(), below if next_kind == "text" else None


def rewrite(page: Path) -> None:
    """Run a page, and write what its blocks print into the blocks of text below them."""
    text = page.read_text()
    for code, printed, below in outputs(text, page.name):
        if below is not None:
            before = f"```python\n{code}```\n\n```text\n"
            text = text.replace(f"{before}{below}```", f"{before}{printed}```")
    page.write_text(text)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    os.chdir(PICTURES)
    for path in paths:
        start = time.process_time()
        rewrite(path)
        print(f"{path.name}: {time.process_time() - start:.0f} s of processor time", flush=True)
