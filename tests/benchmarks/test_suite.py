"""The benchmark suite at a size that says whether it works: tasks, methods, grids, resuming, tables, figures."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import bars
import data
import figures
import lower_rules
import methods
import report
import runs
import scaling
import suite
import tasks
from adaptive_bilevel.evaluation.counts import Counts
from benchmark import BENCHMARKS
from grid import HALF, Grid
from loop import Run, Unrolling
from tasks import network, start_of_few_shot

SHORT: dict[str, Any] = {"iterations": 2, "evaluate_every": 1}
OWN = [name for name in methods.BILEVEL if name not in methods.PEERS]
WITH_NUMBER = ("sgd", "adam", "bisps-2")


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    torch.set_default_dtype(torch.float32)


def job(task: str, method: str, **settings: Any) -> runs.Job:
    return runs.Job(task, {**SHORT, **settings}, runs.Method.parse(method), 0)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_starts(name: str) -> None:
    benchmark = BENCHMARKS[name]
    method = runs.Method.parse(benchmark.ours[0])
    settings, task, _ = runs.Job(benchmark.task, {**benchmark.settings, **SHORT}, method, 0).start(None)
    assert settings["iterations"] == 2
    assert math.isfinite(task.evaluate()["loss"])


@pytest.mark.parametrize(
    ("task", "method", "settings"),
    [
        ("hyper-cleaning", "bisls-adam", {}),
        ("hyper-cleaning", "bisls-sgd", {"lower_batch": 50, "upper_batch": 50}),
        ("hyper-representation", "bisls-adam", {}),
        ("distillation", "bisls-sgd", {"iterations": 4}),
        ("few-shot", "bisls-adam", {"episodes": 2, "iterations": 6}),
        ("regularisation", "bisls-sgd", {}),
        ("regularisation", "bisls-sgd", {"kind": "ridge", "per_feature": False}),
        ("regularisation", "bisls-sgd", {"kind": "softmax", "name": "news20_small"}),
        ("regularisation", "s-tfbo", {"iterations": 10, "evaluate_every": 5}),
        ("hyper-cleaning", "d-tfbo", {"iterations": 10, "evaluate_every": 5}),
        ("wide-quadratic", "bisls-adam", {}),
        ("architecture", "bisls-adam", {"lower_batch": 64, "upper_batch": 64}),
        ("label-noise", "bisls-adam", {}),
        ("label-noise", "bisls-sgd", {"model": "tanh", "lower_batch": 64, "upper_batch": 64}),
        ("meta-weight", "bisls-adam", {}),
        ("smoothing", "bisls-sgd", {"solver": "neumann"}),
        ("start-of-few-shot", "bisls-adam", {"episodes": 2}),
        ("weight-decay", "bisls-adam", {}),
        ("weight-decay", "bisls-sgd", {"per_layer": True, "lower_batch": 64}),
        ("logistic-regression", "slsb", {}),
        ("lenet", "sls", {"iterations": 6, "rows": 500}),
        ("two-quadratics", "spsb", {"iterations": 20}),
    ],
)
def test_the_loss_falls(task: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    (row,), _ = runs.run([job(task, method, **settings)], tmp_path, None)
    losses = [entry["loss"] for entry in row["evaluations"]]
    assert losses[-1] < losses[0]
    assert row["summary"]["cost_per_iteration"] > 0


@pytest.mark.parametrize("lower", ["", "lower=search", "lower=0.1"])
@pytest.mark.parametrize("name", OWN)
def test_every_method_takes_every_lower_rule(name: str, lower: str, tmp_path: Path) -> None:
    options = [option for option in ("lr=0.1" * (name in WITH_NUMBER), lower) if option]
    (row,), _ = runs.run([job("regularisation", ":".join(filter(None, [name, ",".join(options)])))], tmp_path, None)
    assert math.isfinite(row["summary"]["loss"])
    assert row["cost"]["lower"] > 0 and row["cost"]["hypergradient"] > 0


@pytest.mark.parametrize("name", sorted(methods.PEERS))
def test_peers_run_or_say_what_is_missing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = methods.PEERS[name][0]
    rows, missing = runs.run([job("regularisation", f"{name}:lower=search")], tmp_path, None)
    if importlib.util.find_spec(package):
        assert math.isfinite(rows[0]["summary"]["loss"])
    else:
        assert not rows and package in missing[name] and package in capsys.readouterr().out


def test_a_constant_step_costs_what_it_should(tmp_path: Path) -> None:
    settings = {"lower_steps": 3, "solver_steps": 4}
    (row,), _ = runs.run([job("regularisation", "sgd:lr=1e-3,lower=1e-3", **settings)], tmp_path, None)
    # 3 lower gradients; for the hypergradient a gradient of each level, 4 Hessian-vector products, one with C
    assert row["summary"]["cost_per_iteration"] == pytest.approx(3 + 2 + 4 * 2.2 + 1)


@pytest.mark.parametrize(("solver", "products"), [("unroll", 1), ("neumann", 10), ("lanczos", 10)])
def test_the_products_of_a_kind_of_hypergradient(solver: str, products: int, tmp_path: Path) -> None:
    chosen = job("hyper-cleaning", f"adam:lr=0.1,solver={solver}", solver_scale=1e-3)  # a series that does not grow
    (row,), _ = runs.run([chosen], tmp_path, None)
    assert row["summary"]["products_per_iteration"] == products


def test_the_solver_by_default_is_the_package_s() -> None:
    task = tasks.BILEVEL["weight-decay"](0)
    assert task.settings.solver == "default" and task.settings.make_solver() is None
    with pytest.raises(ValueError, match="choose one of cg, default"):
        replace(task.settings, solver="nonsense").make_solver()


@pytest.mark.parametrize("task", tasks.NETWORK_BELOW)
def test_unrolling_one_step_is_the_derivative_through_it(task: str) -> None:
    """Against autograd through y - b grad_y g; the lists of the task hold the same tensors afterwards."""
    chosen = tasks.BILEVEL[task](0)
    generator, spent = torch.Generator().manual_seed(0), Counts()
    lower_batch = chosen.sample_lower(generator)
    upper_batch = chosen.sample_upper(generator)
    unrolling, upper, lower = Unrolling(chosen, spent), list(chosen.upper), list(chosen.lower)
    unrolling.remember()
    gradients = torch.autograd.grad(chosen.lower_loss(lower_batch), lower, create_graph=True)
    chosen.lower[:] = [y - 0.1 * gradient for y, gradient in zip(lower, gradients, strict=True)]
    expected = torch.autograd.grad(chosen.upper_loss(upper_batch), upper)
    with torch.no_grad():
        for y, moved in zip(lower, chosen.lower, strict=True):
            y.copy_(moved)
    chosen.lower[:] = lower
    _, found = unrolling.differentiate((upper_batch,), (lower_batch,), 0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert all(a is b for a, b in zip([*chosen.upper, *chosen.lower], [*upper, *lower], strict=True))
    assert spent.hvps == 1


@pytest.mark.parametrize("task", tasks.NETWORK_BELOW)
def test_resolving_leaves_the_point_as_it_is(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (network, start_of_few_shot):
        monkeypatch.setattr(module, "RESOLVING", 3)
    chosen = tasks.BILEVEL[task](0)
    chosen.sample_lower(torch.Generator().manual_seed(0))
    before, evaluated = [tensor.clone() for tensor in chosen.lower], chosen.evaluate()
    resolved = chosen.resolve()
    assert all(torch.equal(a, b) for a, b in zip(before, chosen.lower, strict=True))
    assert {f"resolved_{key}" for key in evaluated} == set(resolved) and resolved["resolved_loss"] != evaluated["loss"]


def test_the_same_job_gives_the_same_run_in_any_company(tmp_path: Path) -> None:
    chosen = job("hyper-cleaning", "bisls-sgd:lower=search", lower_batch=50)
    (alone,), _ = runs.run([chosen], tmp_path / "alone", None)
    company = [job("hyper-cleaning", f"adam:lr={lr}", lower_batch=50) for lr in (0.1, 0.2)]
    *_, among = runs.run([*company, chosen], tmp_path / "among", None)[0]
    assert [entry["loss"] for entry in alone["evaluations"]] == [entry["loss"] for entry in among["evaluations"]]


def test_finished_runs_are_read_again(tmp_path: Path) -> None:
    jobs = [job("logistic-regression", method) for method in ("spsb", "sgd:lr=1.0")]
    runs.run(jobs[:1], tmp_path, None)
    path = jobs[0].path(tmp_path, None)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 77'))
    first, second = runs.run(jobs, tmp_path, None)[0]
    assert (first["seed"], second["seed"]) == (77, 0)
    assert not list(tmp_path.glob("*.partial"))


def test_jobs_that_differ_have_different_files(tmp_path: Path) -> None:
    jobs = [
        job("regularisation", "adam:lr=0.1"),
        job("regularisation", "adam:lr=0.1", iterations=3),
        job("regularisation", "adam:lr=0.2"),
        job("hyper-cleaning", "adam:lr=0.1"),
    ]
    assert len({entry.path(tmp_path, None) for entry in jobs}) == 4


def test_hopeless_and_diverged_runs() -> None:
    def run(*losses: float) -> Run:
        return Run(evaluations=[{"iteration": i, "loss": loss} for i, loss in enumerate(losses)])

    assert not run(1.0, 9.0, 0.5).diverged()
    assert run(1.0, 11.0, 0.5).diverged() and not run(1.0, 11.0).hopeless()
    assert run(1.0, math.nan).diverged() and run(1.0, math.nan).hopeless() and run(1.0, 1e5).hopeless()


def test_an_optimizer_that_gives_up_has_diverged(tmp_path: Path) -> None:
    hopeless = job("regularisation", "sgd:lr=1e30,lower=search", iterations=50, lower_steps=10, evaluate_every=50)
    (row,), _ = runs.run([hopeless], tmp_path, None)
    assert row["summary"]["diverged"] and math.isnan(row["summary"]["loss"])


def test_a_grid_is_refined_around_its_winner_and_beyond_its_ends() -> None:
    grid = Grid("adam", (0.01, 0.1, 1.0), ("search", 0.1, 1.0))
    assert len(grid.coarse()) == 9
    inside = {m.options["lr"] for m in grid.finer(grid.method(0.1, "search"))}
    assert inside == {float(f"{0.1 / HALF:.3g}"), float(f"{0.1 * HALF:.3g}")}
    corner = [(m.options["lr"], m.options["lower"]) for m in grid.finer(grid.method(1.0, 1.0))]
    assert (10.0, 10.0) in corner and (1.0, 1.0) not in corner and len(corner) == 15


def table_of(losses: dict[str, list[float]]) -> report.Table:
    base: dict[str, Any] = {"options": {}, "outcomes": {}}
    summary = {"diverged": False, "seconds": 1.0}
    rows = [
        {**base, "method": name, "seed": seed, "summary": {**summary, "loss": loss}}
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return report.Table(BENCHMARKS["hyper-cleaning"], rows, {})


def test_scores_are_medians_and_what_is_missing_or_diverged_is_the_worst() -> None:
    table = table_of({"adam": [1.0, 3.0, 2.0], "sgd": [1.0], "bisps": [math.nan, math.nan, 0.1]})
    assert table.score(runs.Method("adam"), (0, 1, 2)) == 2.0
    assert table.score(runs.Method("sgd"), (0, 1, 2)) == math.inf
    assert table.score(runs.Method("bisps"), (0, 1, 2)) == math.inf


def test_the_suite_writes_a_table_and_a_figure(tmp_path: Path) -> None:
    arguments = ["--quick", "--task", "penalties-a9a", "--output", str(tmp_path)]
    suite.main(arguments)
    content = json.loads((tmp_path / "penalties-a9a.json").read_text())
    assert {row["kind"] for row in content["rows"]} >= {"ours", "grid", "first trial"}
    assert content["data"] == "stand-in" and content["bars"] == []
    assert (tmp_path / "penalties-a9a.png").stat().st_size > 10_000
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "penalties-a9a-quick").iterdir()}
    suite.main(arguments)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "penalties-a9a-quick").iterdir()}
    benchmark = BENCHMARKS["penalties-a9a"].quick()
    held = {entry["bar"]: entry for entry in bars.of(suite.execute(benchmark, tmp_path / "penalties-a9a-quick", None))}
    assert any("best of the adam grid: f(x, y)" in name for name in held)
    assert any("best of the sgd grid: F(x)" in name for name in held)
    cost = next(entry for name, entry in held.items() if "cost of an iteration" in name)
    assert 1 < cost["measured"] < 10 and cost["holds"] == (cost["measured"] <= cost["at most"])


def test_methods_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.main(["--task", "hyper-cleaning", "--method", "bisls-sgd", "--set", "iterations=2", "--seeds", "1",
                "--solver", "neumann", "--output", str(tmp_path)])  # fmt: skip
    assert "| bisls-sgd" in capsys.readouterr().out
    (path,) = (tmp_path / "hyper-cleaning").glob("*.json")
    assert json.loads(path.read_text())["settings"]["solver"] == "neumann"
    with pytest.raises(SystemExit, match="choose from"):
        suite.main(["--task", "hyper-cleaning", "--method", "nonsense", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="write key=value"):
        suite.main(["--task", "hyper-cleaning", "--method", "sgd:0.1", "--output", str(tmp_path)])


def test_a_figure_of_every_kind_of_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"fig04": 3, "fig07": 1, "fig08": 3, "fig09": 2, "fig13": 0}
    panels = [figures.FIGURES[name][index] for name, index in chosen.items()]
    short = [
        figures.replace(panel, methods=panel.methods[:2], vary=panel.vary and (panel.vary[0], panel.vary[1][:2]))
        for panel in panels
    ]
    assert {panel.shown for panel in short} == {"path", "step_sizes", "loss", "picture", "trials_per_iteration"}
    monkeypatch.setitem(figures.FIGURES, "fig04", short)
    figures.main(["--figure", "fig04", "--quick", "--output", str(tmp_path)])
    assert (tmp_path / "fig04.png").stat().st_size > 20_000
    curves = json.loads((tmp_path / "fig04.json").read_text())["curves"]
    assert len(curves) == 2 + 2 + 2 + 1 + 2 and all(math.isfinite(curve["value"]) for curve in curves)


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_the_methods_of_every_figure_exist(name: str) -> None:
    for panel in figures.FIGURES[name]:
        known = tasks.SINGLE_LEVEL if panel.task in tasks.SINGLE_LEVEL else tasks.BILEVEL
        table = methods.SINGLE_LEVEL if panel.task in tasks.SINGLE_LEVEL else methods.BILEVEL
        assert panel.task in known
        assert all(runs.Method.parse(text).name in {*table, *methods.ROWS} for text in panel.methods)


LOOPS = {"lower_steps": 2, "solver_steps": 2}


@pytest.mark.parametrize("method", ["plain-adam", "bisls-sgd", "SPSB"])
def test_scaling_measures_in_a_process_of_its_own(method: str) -> None:
    sizes = {"parameters": 1000, "batch": 8}
    found = scaling.child(method=method, iterations=3, **sizes, **({} if method in scaling.SINGLE else LOOPS))
    assert found["seconds"] > 0.0 and found["peak"] >= 1.0
    assert (found["cost"] > LOOPS["lower_steps"]) is (method not in scaling.SINGLE)


def test_the_rules_of_the_lower_level_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SLS, sgd", "AutoSLS, sgd")
    monkeypatch.setattr(lower_rules, "METHODS", {name: lower_rules.METHODS[name] for name in names})
    lower_rules.main(["--quick", "--seeds", "0", "--output", str(tmp_path / "rules.json")])
    problems = json.loads((tmp_path / "rules.json").read_text())["problems"]
    assert all(tuple(row) == names for row in problems.values())
    same = [row for problem, row in problems.items() if problem.startswith("full batch")]
    assert all(row["SLS, sgd"] == pytest.approx(row["AutoSLS, sgd"], rel=1e-2) for row in same)


def test_ours_are_renewed_beside_what_was_run_before(tmp_path: Path) -> None:
    """The grids and the bars that need both in one process stay; losses are compared with the same grids anew."""
    suite.main(["--task", "label-noise", "--quick", "--output", str(tmp_path / "runs"), "--results", str(tmp_path)])
    path = tmp_path / "label-noise.json"
    before = json.loads(path.read_text())
    ours, grids = ([row for row in before["rows"] if row["kind"] == kind] for kind in ("ours", "grid"))
    stale = {**ours[0], "median": 9.0, "loss": [9.0]}
    kept = {"bar": "bisls-adam, no number / best of the adam grid: seconds to its final loss", "measured": 0.5}
    entries = [
        kept,
        {"bar": "bisls-adam, no number / best of all grids: f(x, y)", "measured": 9.0, "at most": 1.0, "holds": False},
    ]
    path.write_text(json.dumps({**before, "rows": [stale, *before["rows"][1:]], "bars": entries}))
    command = ["--renew", "--task", "label-noise", "--quick", "--output", str(tmp_path / "again"), "--results"]
    suite.main([*command, str(tmp_path)])
    after = json.loads(path.read_text())
    assert after["rows"][0]["loss"] == ours[0]["loss"]
    assert "core_commit" in after["rows"][0]
    assert [row for row in after["rows"] if row["kind"] == "grid"] == grids
    least = min(row["median"] for row in grids)
    assert after["bars"][0] == kept
    assert after["bars"][1]["measured"] == pytest.approx(ours[0]["median"] / least, rel=1e-4)
    assert after["bars"][1]["holds"] == (after["bars"][1]["measured"] <= 1.0)
