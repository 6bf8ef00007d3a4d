"""BiSPS and BiSLS in the paper's form against the reference's numbers (tests/golden.json), through the optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, SPSB, BiSPS, OneStepBiSLS
from adaptive_bilevel.hypergradient import CG, Neumann, implicit
from adaptive_bilevel.policies import Outcome
from tests.problems import Problem, b1

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
EXACT = CG(max_iterations=50, tolerance=0.0)


def close(left: Any, right: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(left), torch.as_tensor(right), rtol=1e-9, atol=1e-9))


class Fixed:
    """The single draw of eq. (13) with a given number of factors."""

    warm_start, resamples = False, False

    def __init__(self, factors: int) -> None:
        self.factors = factors

    def solve(self, matvec: Any, rhs: Any, initial: Any = None) -> Any:
        v = rhs
        for _ in range(self.factors):
            v = [a - 0.25 * b for a, b in zip(v, matvec(v), strict=True)]
        return Neumann(steps=0, scale=3 * 0.25).solve(matvec, v)


BISPS: dict[str, Any] = {
    "bisps_exact": [EXACT] * 3,
    "bisps_neumann_sum": [Neumann(steps=2, scale=0.25)] * 3,
    "bisps_neumann_rand_nbar201": [Fixed(n) for n in (2, 0, 1)],
}


@pytest.mark.parametrize("row", BISPS)
def test_bisps(row: str) -> None:
    """T = 2 lower SPS steps whose bound follows the upper clock, then the envelope of eq. (10)."""
    problem = b1()
    x, y, upper, lower = problem.instance()
    inner: Any = SPSB([y], lr=0.5, decay="inverse", lower_bound=None)
    outer: Any = BiSPS([x], lr=3.0, lr_min=0.1, lower=inner)
    for expected, solver in zip(GOLDEN[row][:-1], BISPS[row], strict=True):
        assert close(x.detach(), expected["x"])
        for beta in expected["beta"]:
            exact = float(problem.g(x.detach(), problem.ystar(x.detach())))
            inner.step(lower, lower_bound=exact)
            assert close(inner.record.step_size, beta)
        x.grad = implicit(upper, lower, [x], [y], solver=solver)[0]
        assert close(x.grad, expected["h"])
        assert close(outer.step(upper), expected["f"])
        assert close(outer.record.proposed, expected["raw"])
        assert close(outer.record.bound, expected["up"])
        assert close(outer.record.step_size, expected["alpha"])
    assert close(x.detach(), GOLDEN[row][-1]["x"])
    assert close(problem.F(x.detach()), GOLDEN[row][-1]["F"])


BISLS: dict[str, dict[str, Any]] = {
    "bisls_sgd_opt1": {"reset": "initial"},
    "bisls_sgd_opt2": {"reset": "keep"},
    "bisls_sgd_opt3": {},
    "bisls_sgd_opt3_T2_search_fails": {"T": 2},
    "bisls_sgd_opt3_T2_matched": {"T": 2, "baseline": "matched"},
    "bisls_adam_opt3": {"direction": "adam"},
    "bisls_adam_b1_0": {"direction": "adam", "betas": (0.0, 0.999)},
}


def paper_step(problem: Problem, T: int = 5, **options: Any) -> tuple[Any, Any, Any]:
    x, y, upper, lower = problem.instance()
    inner: Any = SLS([y], lr=1.0, shrink=0.6, reset="initial", max_step=1.0)
    settings: dict[str, Any] = {"shrink": 0.6, "grow": 2.0, "c": 0.1, "max_trials": 61, **options}
    outer = OneStepBiSLS([x], lr=8.0, lower=inner, **settings)

    def iterate() -> list[tuple[float, int]]:
        steps = []
        for _ in range(T):
            inner.step(lower)
            steps.append((inner.record.step_size, inner.record.trials))
        x.grad = implicit(upper, lower, [x], [y], solver=EXACT)[0]
        return steps

    return (x, y, upper), iterate, outer


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize("row", BISLS)
def test_bisls_in_paper_mode(row: str) -> None:
    """Algorithms 2 and 3 as printed, errata corrected."""
    problem = b1()
    (x, y, upper), iterate, outer = paper_step(problem, **BISLS[row])
    for expected in GOLDEN[row][:-1]:
        assert close(x.detach(), expected["x"])
        lower_steps = iterate()
        assert close(lower_steps, expected["lower"])
        assert close(y.detach(), expected["y"])
        assert close(x.grad, expected["h"])
        assert close(outer.step(upper), expected["f"])
        assert close(y.detach(), expected["y"]), "y-hat is discarded"
        assert (outer.record.outcome != Outcome.search_failed) == expected["found"]
        if expected["found"]:
            assert close(outer.record.step_size, expected["alpha"])
            assert outer.record.trials == expected["trials"]
            assert close(outer.record.value, expected["phi"])
        else:
            assert outer.record.step_size == 0.0
            assert outer.record.trials == 61
            assert close(x.detach(), expected["x"]), "a failed search leaves x as it was"
    assert close(x.detach(), GOLDEN[row][-1]["x"])
    assert close(problem.F(x.detach()), GOLDEN[row][-1]["F"])
    assert close(problem.dF(x.detach()), GOLDEN[row][-1]["dF"])
