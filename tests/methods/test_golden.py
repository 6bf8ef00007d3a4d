"""Every row against the reference's numbers (tests/golden.json), on b1 from x = 4, y = 0, to 1e-9."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_bilevel import Box, methods
from adaptive_bilevel.hypergradient import Exact, Implicit, Neumann
from adaptive_bilevel.policies import SLSB, SPSB, Constant, Envelope, Outcome, PowerDecay
from tests.methods.helpers import Drawn
from tests.problems import b1

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
EXACT = Implicit(Exact())


def close(left: Any, right: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(left), torch.as_tensor(right), rtol=1e-9, atol=1e-9))


def run(name: str, iterations: int = 3, **options: Any) -> list[methods.IterationRecord]:
    problem = b1()
    losses = methods.BilevelProblem(
        upper_loss=lambda x, y, _: problem.f(x, y), lower_loss=lambda x, y, _: problem.g(x, y)
    )
    return list(methods.run(name, losses, problem.x0, problem.y0, iterations=iterations, **options))


def columns(record: methods.IterationRecord, names: str) -> list[Any]:
    """x, y; v, z (auxiliary); h (the estimate), d (the direction of x), D (that of y), l (lambda)."""
    found: dict[str, Any] = {"x": record.x, "y": record.y, "h": record.hypergradient, "l": record.multiplier}
    found |= {"d": record.directions.get("x"), "D": record.directions.get("y"), **record.auxiliary}
    return [found[name] for name in names]


STEPS: dict[str, Any] = {"lower_step": 0.25, "upper_step": 0.5}
SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "soba": ("soba", "xyv", {}),
    "aid_exact_T2": ("ba", "xyh", {"lower_steps": 2}),
    "bsa_T2_neumann": (
        "bsa",
        "xyh",
        {
            "lower_steps": 2,
            "upper_step": Constant(bound=0.5, decay="inverse_sqrt"),
            "lower_step": Constant(bound=0.25, decay="inverse_sqrt"),
        },
    ),
    "stocbio_T2_Q3": ("stocbio", "xyh", {"lower_steps": 2, "solver": Neumann(steps=3, scale=0.25)}),
    "ttsa": (
        "ttsa",
        "xyh",
        {
            "estimator": EXACT,
            "project": Box(0.0, 5.0),
            "upper_step": Constant(bound=0.5, decay=PowerDecay(0.6)),
            "lower_step": Constant(bound=0.25, decay=PowerDecay(0.4)),
        },
    ),
    "stable": ("stable", "xyh", {}),
    "stable_ct_in_bracket": ("stable", "xyh", {"correction": "bracketed"}),
    "sustain": (
        "sustain",
        "xyDd",
        {
            "estimator": EXACT,
            "upper_direction": methods.Storm(0.5),
            "lower_direction": methods.Storm(0.5),
        },
    ),
    "fsla": ("fsla", "xyvd", {"upper_direction": methods.Storm(0.5)}),
    "f2sa": (
        "f2sa",
        "xyz",
        {
            "lower_step": 0.1,
            "auxiliary_step": 0.25,
            "lower_steps": 2,
            "multiplier": methods.Growth(initial=1.0, increment=0.1),
        },
    ),
    "bome": ("bome", "xyl", {"lower_steps": 2}),
}


@pytest.mark.parametrize("key", SCHEMES)
def test_schemes(key: str) -> None:
    name, names, options = SCHEMES[key]
    options = {**STEPS, **options}
    if key == "bsa_T2_neumann":
        options["solver"] = Drawn(2, 0, 1)
    for record, expected in zip(run(name, **options), GOLDEN[key], strict=True):
        assert all(close(a, b) for a, b in zip(columns(record, names), expected, strict=False)), (record, expected)


def test_f2sa_multiplier() -> None:
    options = {**STEPS, **SCHEMES["f2sa"][2]}
    used = [record.multiplier for record in run("f2sa", 4, **options)]
    assert close(used, [1.0, *(row[3] for row in GOLDEN["f2sa"])])


DTFBO: dict[str, dict[str, Any]] = {
    "dtfbo": {},
    "dtfbo_fixed2": {"until": "", "lower_steps": 2, "auxiliary_steps": 2},
    "dtfbo_fixed2_warmacc": {"until": "", "lower_steps": 2, "auxiliary_steps": 2, "cold": ""},
}


@pytest.mark.parametrize("key", DTFBO)
def test_dtfbo(key: str) -> None:
    problem, records, *_ = b1(), run("d-tfbo", **DTFBO[key])
    *rows, end = GOLDEN[key]
    for record, row in zip(records, rows, strict=True):
        y, v = (record.records[name] for name in "yv")
        assert (len(y), len(v)) == (row["P"], row["Q"])
        assert close(record.y, row["y"]) and close(record.auxiliary["v"], row["v"])
        assert close(1 / y[-1].step_size if y else 1.0, row["beta"])
        assert close(1 / v[-1].step_size if v else 1.0, row["gamma"])
        assert close(record.hypergradient, row["h"])
        assert close(1 / record.steps.upper, row["alpha"])
    for record, row in zip(records, [*rows[1:], end], strict=True):
        assert close(record.x, row["x"])
    assert close(problem.F(records[-1].x), end["F"]) and close(problem.dF(records[-1].x), end["dF"])


def test_stfbo() -> None:
    problem, records = b1(), run("s-tfbo")
    *rows, end = GOLDEN["stfbo"]
    for record, row, after in zip(records, rows, [*rows[1:], end], strict=True):
        assert close(record.x, after["x"]) and close(record.y, after["y"]) and close(record.auxiliary["v"], after["v"])
        assert close(record.directions["y"], row["gy"]) and close(record.directions["v"], row["r"])
        assert close(record.hypergradient, row["h"])
        assert close(1 / record.steps.lower, row["beta"])
        assert close(1 / record.records["v"][0].step_size, row["phi"])
        assert close(1 / record.steps.upper, row["alpha"] * row["phi"])
    assert close(problem.F(records[-1].x), end["F"]) and close(problem.dF(records[-1].x), end["dF"])


BISPS: dict[str, Any] = {
    "bisps_exact": lambda: Exact(),
    "bisps_neumann_sum": lambda: Neumann(steps=2, scale=0.25),
    "bisps_neumann_rand_nbar201": lambda: Drawn(2, 0, 1),
}


@pytest.mark.parametrize("key", BISPS)
def test_bisps(key: str) -> None:
    problem = b1()
    records = run(
        "bisps",
        solver=BISPS[key](),
        lower_steps=2,
        upper_step=Envelope(bound=3.0, decay="inverse_sqrt", floor=0.1, floor_decay="inverse_sqrt"),
        lower_step=SPSB(bound=0.5, decay="inverse", lower_bound=None),
        lower_bound=lambda x, _: float(problem.g(x, problem.ystar(x))),
    )
    *rows, end = GOLDEN[key]
    for record, row, after in zip(records, rows, [*rows[1:], end], strict=True):
        assert close([step.step_size for step in record.records["y"]], row["beta"])
        assert (
            close(record.y, row["y"]) and close(record.hypergradient, row["h"]) and close(record.losses.upper, row["f"])
        )
        (upper,) = record.records["x"]
        assert (
            close(upper.proposed, row["raw"]) and close(upper.bound, row["up"]) and close(upper.step_size, row["alpha"])
        )
        assert close(record.x, after["x"])
    assert close(problem.F(records[-1].x), end["F"]) and close(problem.dF(records[-1].x), end["dF"])


PAPER: dict[str, Any] = {"c": 0.1, "shrink": 0.6, "grow": 2.0, "decay": "constant", "lower_bound": None}
BISLS: dict[str, dict[str, Any]] = {
    "bisls_sgd_opt1": {"reset": "initial"},
    "bisls_sgd_opt2": {"reset": "keep"},
    "bisls_sgd_opt3": {},
    "bisls_sgd_opt3_T2_search_fails": {"lower_steps": 2},
    "bisls_sgd_opt3_T2_matched": {"lower_steps": 2, "baseline": "matched"},
    "bisls_adam_opt3": {"upper_direction": methods.Adam()},
    "bisls_adam_b1_0": {"upper_direction": methods.Adam(betas=(0.0, 0.999))},
}


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize("key", BISLS)
def test_bisls_in_paper_mode(key: str) -> None:
    options = {"lower_steps": 5, **BISLS[key]}
    reset = options.pop("reset", "grow")
    problem, name = b1(), "bisls-adam" if "adam" in key else "bisls-sgd"
    records = run(
        name,
        solver=Exact(),
        response="step",
        lower_step=SLSB(bound=1.0, reset="initial", **PAPER),
        upper_step=SLSB(bound=8.0, reset=reset, max_trials=61, **PAPER),
        **options,
    )
    *rows, end = GOLDEN[key]
    for record, row, after in zip(records, rows, [*rows[1:], end], strict=True):
        assert close([(step.step_size, step.trials) for step in record.records["y"]], row["lower"])
        (upper,) = record.records["x"]
        assert (
            close(record.y, row["y"]) and close(record.hypergradient, row["h"]) and close(record.losses.upper, row["f"])
        )
        assert (upper.outcome != Outcome.search_failed) == row["found"]
        assert close(upper.step_size, row["alpha"] if row["found"] else 0.0)
        assert upper.trials == row["trials"]
        if row["found"]:
            assert close(upper.value, row["phi"])
        assert close(record.x, after["x"])
    assert close(problem.F(records[-1].x), end["F"]) and close(problem.dF(records[-1].x), end["dF"])


def test_every_bilevel_number_is_tested() -> None:
    here = {*SCHEMES, *DTFBO, *BISPS, *BISLS, "stfbo"}
    estimators = {"B2_estimators", "B2_point"}
    bilevel = list(itertools.dropwhile(lambda key: key != "bisps_exact", GOLDEN))
    assert here | estimators == set(bilevel)
