"""`monitor` and `plot`: a step as a dict of scalars, and a run as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, AutoSLS, BiSLS, BiSPS, OneStepBiSLS, SPSMax, monitor, plot
from adaptive_bilevel.errors import DependencyError, OptionError
from adaptive_bilevel.hypergradient import SolverStatus, implicit
from adaptive_bilevel.policies import Outcome

STEP = {"loss", "step_size", "slope", "slope_ratio", "trials", "outcome", "values", "gradients", "hvps", "jvps"}
SOLVE = {"solver", "solver_residual"}


def run(cls: Any, lowers: Any, steps: int = 4, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return an upper optimizer after some steps, and the rows."""
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    ys = [torch.zeros(2, requires_grad=True) for _ in lowers]
    inner = [lower([y]) for lower, y in zip(lowers, ys, strict=True)]
    outer = cls([x], lower=inner, hypergradient=implicit, **options)

    def g(y: Tensor) -> Tensor:
        return ((y - x) ** 2).sum() + 0.1 * (y**4).sum()

    rows = []
    for _ in range(steps):
        for optimizer, y in zip(inner, ys, strict=True):
            for _ in range(3):
                optimizer.zero_grad()
                g(y).backward()
                optimizer.step(lambda y=y: g(y))
        loss = outer.step(
            lambda: torch.stack([((y - 0.2) ** 2).sum() for y in ys]).sum(), [lambda y=y: g(y) for y in ys]
        )
        rows.append(monitor(outer))
        assert rows[-1]["upper/loss"] == float(loss)
    return outer, rows


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1)


def keys(level: str, parts: set[str]) -> set[str]:
    return {f"{level}/{part}" for part in parts}


RESPONSE = keys("response", {"values", "gradients", "hvps", "jvps"})
RUNS: dict[str, tuple[Any, list[Any], set[str]]] = {
    "searches": (BiSLS, [SLS], keys("upper", STEP | SOLVE) | keys("lower", STEP) | RESPONSE),
    "polyak": (BiSPS, [SPSMax], keys("upper", STEP | SOLVE) | keys("lower", STEP) | RESPONSE),
    "stock": (BiSLS, [sgd], keys("upper", STEP | SOLVE) | {"lower/step_size"} | RESPONSE),
    "several": (
        BiSLS,
        [AutoSLS, sgd],
        keys("upper", STEP | SOLVE) | keys("lower/0", STEP) | {"lower/1/step_size"} | RESPONSE,
    ),
    "one step": (OneStepBiSLS, [SLS], keys("upper", STEP | SOLVE) | keys("lower", STEP) | RESPONSE),
}


@pytest.mark.parametrize("name", RUNS)
def test_rows_have_the_same_names_and_plain_scalars(name: str) -> None:
    cls, lowers, names = RUNS[name]
    outer, rows = run(cls, lowers)
    for row in rows:
        assert set(row) == names
        assert all(type(value) in (int, float, str) for value in row.values())
    assert all(type(value) in (int, float) for value in monitor(outer, words=False).values())
    json.dumps(rows)
    csv.DictWriter(io.StringIO(), list(rows[0])).writerows(rows)


def test_a_row_is_what_the_optimizers_say() -> None:
    outer, rows = run(BiSLS, [SLS])
    row, record, lower = rows[-1], outer.record, outer.lower.optimizers[0]
    assert row["upper/step_size"] == record.step_size == outer.param_groups[0]["step_size"]
    assert (row["upper/slope"], row["upper/slope_ratio"]) == (record.slope, record.slope_ratio)
    assert row["upper/outcome"] == Outcome(record.outcome).name == "accepted"
    assert row["upper/solver"] == outer.hessian.status.name in SolverStatus.__members__
    assert row["upper/values"] == outer.evaluations.upper.values
    assert row["response/hvps"] == outer.evaluations.lower.hvps
    assert row["lower/step_size"] == lower.record.step_size
    assert row["lower/gradients"] == lower.evaluations.lower.gradients
    assert monitor(outer, words=False)["upper/outcome"] == 0
    assert monitor(lower) == {name: value for name, value in row.items() if name.startswith("lower/")}


def test_a_step_that_moves_nothing_and_a_level_that_has_not_stepped() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    outer = BiSLS([x], lower=SLS([y]), hypergradient=implicit)
    outer.step(lambda: ((y + x) ** 2).sum() * math.inf, lambda: ((y - x) ** 2).sum())
    row = monitor(outer)
    assert (row["upper/outcome"], row["upper/step_size"]) == ("non_finite", 0.0)
    assert (row["lower/outcome"], row["lower/trials"]) == ("none", 0) and math.isnan(float(row["lower/loss"]))
    assert row["upper/solver"] == "none" and monitor(outer, words=False)["upper/solver"] == -1


def test_what_is_no_optimizer_or_has_not_stepped_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(OptionError, match=r"monitor\(SGD\): pass an optimizer"):
        monitor(sgd([x]))
    with pytest.raises(OptionError, match="SLS has taken no step yet"):
        monitor(SLS([x]))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cls, lowers, _ = RUNS[name]
    _, rows = run(cls, lowers)
    figure = plot(rows, tmp_path / "run.png", title=name)
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert [axis.get_title() for axis in figure.axes[:2]] == ["upper level", "lower level"]
    drawn = figure.axes[0].lines[0].get_ydata()
    assert list(drawn) == [row["upper/loss"] for row in rows]
    steps = figure.axes[3].lines
    assert len(steps) == len(lowers) and list(steps[0].get_ydata())[-1] > 0.0
    labels = [label.get_text() for label in figure.axes[4].get_yticklabels()]
    assert any(label.startswith("accepted (") or label.startswith("at bound (") for label in labels)


def test_one_level_and_outcomes_as_numbers() -> None:
    pytest.importorskip("matplotlib")
    x = torch.tensor([1.0], requires_grad=True)
    optimizer, rows = SLS([x]), []
    for scale in (1.0, math.nan, -1.0):

        def loss(factor: float = scale) -> Tensor:
            return (factor * (x**2 + 1.0)).sum()

        optimizer.step(loss, lower_bound=-1e3)
        rows.append(monitor(optimizer, words=False))
    figure = plot(rows)
    assert len(figure.axes) == 3 and figure.axes[0].get_yscale() == "linear"
    assert len(figure.axes[2].get_yticklabels()) >= 2
    with pytest.raises(OptionError, match=r"rows\.append"):
        plot([])
    with pytest.raises(OptionError, match=r"rows\.append"):
        plot([{"loss": 1.0}])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="pip install matplotlib"):
        plot([{"upper/loss": 1.0, "upper/step_size": 1.0}])
    assert issubclass(DependencyError, ImportError)
