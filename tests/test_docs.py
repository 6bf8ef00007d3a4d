"""The pages for readers: programs run and print what they say, links lead somewhere, the API has every public name."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(("path", "mark", "table"), tables.MARKED, ids=lambda part: getattr(part, "name", None))
def test_the_tables_of_all_tasks_are_those_of_the_results(path: Path, mark: str, table: Callable[[], str]) -> None:
    marked = tables.between(path.read_text(), mark)
    assert marked is not None and marked[2] == f"{table()}\n", "run python examples/benchmarks/tables.py"


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


HOST = {"adaptive_bilevel_betty": "betty", "adaptive_bilevel_torchopt": "torchopt"}
ARGUMENTS = re.compile(r"(?:those of|[Aa]s in|[Aa]s|see) `([\w.]+)`|`([\w.]+)` as a problem's optimizer")
"""Where a docstring says that its arguments are those of another one."""
RAISES = re.compile(r"^ +raise \w+Error|validation\.|\b(?:positive|non_negative|count|fraction|choice)\(", re.MULTILINE)
BASES = "base classes for hosts, without a constructor"
NO_EXAMPLE = {
    "records, which a step or a function returns, and contexts, which roles are given": """
        Change CheckReport Context Descent DirectionCheck Estimate Evaluated Gradient HessianReport ImplicitInfo Losses
        LowerGradients MomentumContext PaceContext PartialGradients Point PredictionContext Replay
        Solution Taken Verdict Visit
        """,
    "states of rules, from init()": "BoundState DecSPSState GradientNormState ScaleByPolicyState SearchState State",
    "roles: the package `bilevel` has the example of one": """
        Diagnosis Direction ModelCheck Momentum Pace Prediction Response ResponseModel StepCheck Tangent Unanswered
        """,
    "protocols that the named classes implement": "Estimator LinearSolver Lower LowerProblem Policy Trial",
    BASES: "OneStepSearch UpperPolyak UpperSearch",
    "made by a step that is given lower=": "FunctionalLower",
    "Betty: the example of `bind` serves for all its optimizers": """
        AdaptiveEngine AutoSLS BiSPS DecSPS OneStepBiSLS SLSB SPSB SPSMax
        """,
    "TorchOpt: what `chain` returns": "GradientTransformationExtraArgs",
}
"""Public names that no doctest of their package has, and why. Errors are not examples either."""


def public(module: str) -> dict[str, Any]:
    """Return the functions and classes of a module's `__all__`."""
    if module in HOST:
        pytest.importorskip(HOST[module])
    of = importlib.import_module(module)
    objects = {name: getattr(of, name) for name in exported(module)}
    return {name: o for name, o in objects.items() if inspect.isclass(o) or inspect.isfunction(o)}


def described(o: Any, seen: tuple[Any, ...] = ()) -> str:
    """Return the docstrings that describe the arguments of an object: its own, its bases', and those that it names."""
    if not (inspect.isclass(o) or inspect.isfunction(o)) or o in seen:
        return ""
    text = "\n".join(c.__doc__ or "" for c in (o.__mro__ if inspect.isclass(o) else [o]) if "adaptive" in c.__module__)
    homes = [importlib.import_module(name) for name in {o.__module__, o.__module__.split(".")[0], "adaptive_bilevel"}]
    for found in ARGUMENTS.findall(text):
        name = "".join(found).removeprefix("adaptive_bilevel.")
        for home in homes:
            named = home
            for part in name.split("."):
                named = getattr(named, part, None)  # type: ignore[assignment]
            text += described(named, (*seen, o))
    return text


def constructor(o: Any) -> str:
    """Return the source of what checks arguments."""
    checks = [o] if inspect.isfunction(o) else [vars(o).get("__init__"), vars(o).get("__post_init__")]
    written = [f for f in checks if inspect.isfunction(f) and Path(f.__code__.co_filename).is_file()]
    return "".join(map(inspect.getsource, written))


def is_made_by_users(o: Any) -> bool:
    made = not issubclass(o, (BaseException, enum.Enum)) if inspect.isclass(o) else True
    return made and not getattr(o, "_is_protocol", False) and o.__name__ not in NO_EXAMPLE[BASES].split()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_docstring(module: str) -> None:
    assert not {name for name, o in public(module).items() if not inspect.getdoc(o)}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_argument_is_described(module: str) -> None:
    missing = {}
    for name, o in public(module).items():
        if is_made_by_users(o):
            names = [p.lstrip("_") for p in inspect.signature(o).parameters if p not in ("args", "kwargs")]
            missing[name] = [p for p in names if not re.search(rf"\b{p}\b", described(o))]
    assert not {name: arguments for name, arguments in missing.items() if arguments}


@pytest.mark.parametrize("module", PUBLIC)
def test_what_checks_its_arguments_names_its_errors(module: str) -> None:
    checking = {name: o for name, o in public(module).items() if is_made_by_users(o) and RAISES.search(constructor(o))}
    assert not {name for name, o in checking.items() if "Raises:" not in described(o)}


def doctests(folder: Path) -> str:
    """Return the lines of all doctests in a folder, with what they print."""
    texts = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts += re.findall(r"^ *>>> .*(?:\n.*\S.*)*", ast.get_docstring(node) or "", re.MULTILINE)
    return "\n".join(texts)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_without_an_example_are_listed(module: str) -> None:
    inside = doctests(ROOT / "adaptive_bilevel" if module == "adaptive_bilevel" else folder(module))
    without = {
        name
        for name, o in public(module).items()
        if o.__module__.startswith(module) and ">>>" not in (o.__doc__ or "") and not re.search(rf"\b{name}\b", inside)
        if not (inspect.isclass(o) and issubclass(o, BaseException))
    }
    listed = {name for names in NO_EXAMPLE.values() for name in names.split()}
    assert without <= listed
