"""A run as a stream: left early, stopped, shown, saved and resumed, compared, and interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import methods
from adaptive_bilevel.errors import OptionError
from tests.methods.helpers import OPTIONS, data, problem_of, run, start, stochastic
from tests.optim.helpers import plain
from tests.problems import b2, ridge_hpo


def test_a_generator_of_records_can_be_left_early() -> None:
    stream = methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=10)
    assert [next(stream).iteration, next(stream).iteration] == [0, 1]
    assert len(list(stream)) == 8
    assert list(stream) == []


def test_early_stop() -> None:
    records = run("ba", ridge_hpo(), 50, stop=lambda record: record.iteration == 4)
    assert len(records) == 5


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    run("soba", b2(), 3, progress=lambda record: seen.append(record.iteration))
    assert seen == [0, 1, 2] and capsys.readouterr().err == ""
    run("soba", b2(), 3, progress=True)
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3 and shown.endswith("of 3\n")


# ----------------------------------------------------------------------------------------------------------- resuming


def told(records: list[methods.IterationRecord]) -> Any:
    return repr(
        [(plain(r.x), plain(r.y), r.losses, r.records, r.evaluations, r.total, plain(r.auxiliary)) for r in records]
    )


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"lower_steps": 20, "auxiliary_steps": 20} if name == "d-tfbo" else {"lower_steps": 3}
    whole = list(start(name, **more))
    stream = start(name, **more)
    first = [next(stream) for _ in range(3)]
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)  # the global random state has no part in it
    second = list(start(name, resume=torch.load(tmp_path / "state.pt", weights_only=True), **more))
    assert told(first + second) == told(whole)


def test_resume_in_another_process(tmp_path: Path) -> None:
    stream = start("bisls-adam")
    for _ in range(3):
        next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    code = (
        "import torch, json; torch.set_default_dtype(torch.float64); torch.set_num_threads(1)\n"
        "from tests.methods.helpers import start\n"
        f"state = torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True)\n"
        "print(json.dumps([r.x.tolist() for r in start('bisls-adam', resume=state)]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [r.x.tolist() for r in stream]


def test_a_state_belongs_to_its_row_and_shapes() -> None:
    state = methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=3).state_dict()
    with pytest.raises(OptionError, match="'soba'"):
        methods.run("saba", problem_of(b2()), b2().x0, b2().y0, iterations=3, resume=state)
    with pytest.raises(OptionError, match="saved with shapes"):
        methods.run("soba", problem_of(b2()), torch.ones(3), b2().y0, iterations=3, resume=state)


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (OptionError, {"iterations": 0}),
        (OptionError, {"iterations": 2.5}),
        (OptionError, {"max_skips": 0}),
        (OptionError, {"seed": -1}),
        (OptionError, {"v": torch.ones(7)}),
        (OptionError, {"problem": "b2"}),
        (OptionError, {"name": "sbo"}),
    ],
    ids=str,
)
def test_wrong_arguments(error: type[Exception], arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": "soba", "problem": problem_of(b2()), "iterations": 2, **arguments}
    with pytest.raises(error, match=r"methods\.run\("):
        methods.run(given.pop("name"), given.pop("problem"), b2().x0, b2().y0, **given)


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_an_exception_leaves_the_run_where_it_was(name: str) -> None:
    """At any call of a loss in the third iteration; the run then goes on as if nothing had happened."""
    problem, x, y = stochastic()
    calls, at = 0, -1

    def lower(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == at:
            raise KeyboardInterrupt
        return problem.lower_loss(*arguments)

    fragile = methods.BilevelProblem(upper_loss=problem.upper_loss, lower_loss=lower)
    options = dict(OPTIONS.get(name, {}))
    options |= {"lower_steps": 3, "auxiliary_steps": 3} if name == "d-tfbo" else {"lower_steps": 3}
    batches = methods.Minibatches(data(), data(), size=12, blocks=options.pop("batches", None) == "blocks", seed=5)
    stream = methods.run(name, fragile, x, y, iterations=6, batches=batches, **options)
    for _ in range(2):
        next(stream)
    before = stream.state_dict()
    one = plain(next(stream).x)
    stream.load_state_dict(before)
    at = calls + (name not in ("soba", "saba", "s-tfbo"))  # these evaluate g once in an iteration
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert repr(plain(stream.state_dict())) == repr(plain(before))
    assert plain(next(stream).x) == one


# ---------------------------------------------------------------------------------------------------------- comparing


def test_compare_and_budget() -> None:
    entries: dict[str, Any] = {"a": "ba", "b": ("ba", {"upper_step": 0.2}), "c": "soba"}
    problem, x, y = stochastic()
    batches = methods.Minibatches(data(), data(), size=12)
    runs = methods.compare(entries, problem, x, y, iterations=100, batches=batches, budget=60.0, seed=3)
    assert list(runs) == ["a", "b", "c"]
    for label, records in runs.items():
        assert records[-1].total_cost >= 60.0 > records[-2].total_cost, label
    assert runs["a"][0].losses == runs["b"][0].losses  # the same stream
    alone = list(methods.run("ba", problem, x, y, iterations=100, batches=batches, budget=60.0, seed=3))
    assert torch.equal(alone[-1].x, runs["a"][-1].x)
    assert set(methods.compare(["ba", "soba"], problem_of(b2()), b2().x0, b2().y0, iterations=1)) == {"ba", "soba"}
    with pytest.raises(OptionError, match="budget"):
        run("soba", b2(), 2, budget=0.0)
