"""What an upper step reports: counts, slopes, warnings, sentences; and the way back from a wrong hypergradient."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import CG, Identity, Neumann, implicit
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import EXACT, Traced
from tests.problems import Instance, random_qb

RARE = "ignore:.*no trial step gave"


def both(seed: int = 1, lr: float | None = 1.0, **options: Any) -> tuple[Instance, Any, Any]:
    point = random_qb(seed).instance()
    inner = SLS([point.y], 1.0, lower_bound=None)
    if "step" in options:
        return point, inner, OneStepBiSLS([point.x], lr, lower=inner, response_steps=options.pop("step"), **options)
    return point, inner, BiSLS([point.x], lr, lower=inner, **options)


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.filterwarnings(RARE, "ignore:.*slope is negative", "ignore:.*left the minimum")
@pytest.mark.parametrize("curvature", [0.5, float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": EXACT},
        {"solver": CG(max_iterations=2, tolerance=0.0)},
        {"solver": Neumann(steps=3, scale=0.1)},
        {"solver": Identity(0.1)},
        {"direction": "adam"},
        {"step": 1},
        {"step": 3, "baseline": "matched"},
    ],
    ids=str,
)
def test_evaluations_are_counted(options: dict[str, Any], curvature: float) -> None:
    """One gradient and a value per trial of the upper closure; the lower one as often as it is counted."""
    check: dict[str, Any] = {} if "step" in options else {"curvature": curvature, "pace": "every"}
    point, inner, outer = both(lr=30.0, **check, **options)
    trials, looks = 0, 0
    for _ in range(6):
        inner.step(point.lower)
        point.x.grad = implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
        upper, lower = Traced(point.upper), Traced(point.lower)
        inner.sample = inner.sample._replace(closure=lower)
        counts = outer.evaluations
        before = [counts.upper.gradients, counts.upper.values, counts.lower.gradients, counts.lower.values]
        outer.step(upper)
        if outer.record.outcome == Outcome.returned:  # the series is far from the inverse, and f rises
            continue
        matched = options.get("baseline") == "matched"
        k = outer.record.trials + matched
        trials += k
        gradients = counts.lower.gradients - before[2]
        values = counts.upper.values - before[1]
        looks += values - k
        assert (upper.graphs.count(True), upper.graphs.count(False)) == (1, values)
        assert counts.upper.gradients - before[0] == 1
        assert lower.graphs.count(True) == gradients
        assert lower.graphs.count(False) == counts.lower.values - before[3] == 0
        if "step" in options:
            assert gradients == k * options["step"]
        elif curvature == float("inf"):
            assert gradients == 1
        else:
            assert 2 <= gradients <= 1 + 2 * k  # a candidate in doubt is looked at from half way, too
    assert trials >= 5
    assert looks <= ("step" in options)  # one, where a search has failed: whether the closure changes
    if "step" not in options and outer.record.slope_ratio > 0.1:
        assert counts.lower.jvps >= 5
        if isinstance(options.get("solver"), Neumann):
            assert counts.lower.hvps >= 5 * 3
        if isinstance(options.get("solver"), Identity):
            assert counts.lower.hvps >= 5
    else:
        assert counts.lower.hvps == counts.lower.jvps == 0 or "step" not in options


def test_products_are_counted_exactly() -> None:
    """CG with k steps takes k HVPs and the tangent one JVP, if nothing is solved further."""
    for steps in (1, 2):
        point, inner, outer = both(solver=CG(max_iterations=steps, tolerance=0.0))
        inner.step(point.lower)
        point.x.grad = implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
        outer.step(point.upper)
        assert outer.evaluations.lower.jvps == 1
        assert outer.evaluations.lower.hvps == (steps if outer.record.slope_ratio > 0 else 0) or steps == 1


def test_bisps_counts_values() -> None:
    point = random_qb(1).instance()
    outer: Any = BiSPS([point.x], 1.0)
    point.x.grad = torch.ones(3)
    upper = Traced(point.upper)
    outer.step(upper)
    assert upper.graphs == [False]
    assert (outer.evaluations.upper.values, outer.evaluations.upper.gradients) == (1, 0)
    assert outer.evaluations.lower.cost == 0
    outer.step(loss=3.0)
    assert outer.evaluations.upper.values == 1


# ------------------------------------------------------------------------------------------------ a wrong hypergradient


@pytest.mark.filterwarnings(RARE)
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("wrong", ["sign", "random"])
def test_a_wrong_hypergradient_is_replaced_and_told_once(wrong: str, direction: str) -> None:
    problem = random_qb(2)
    point = problem.instance()
    inner = SLS([point.y], 1.0, lower_bound=None)
    outer: Any = BiSLS([point.x], 1.0, lower=inner, direction=direction, solver=EXACT)
    generator, before = torch.Generator().manual_seed(0), problem.F(point.x.detach())
    ratios = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(50):
            for _ in range(3):
                inner.step(point.lower)
            h = implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
            point.x.grad = -h if wrong == "sign" else torch.randn(3, generator=generator)
            kept = point.x.grad.clone()
            outer.step(point.upper)
            assert torch.equal(point.x.grad, kept)
            assert outer.record.outcome != Outcome.no_descent
            assert problem.F(point.x.detach()) <= 10 * before
            ratios.append(outer.record.slope_ratio)
    told = [w for w in caught if "disagree" in str(w.message)]
    assert problem.F(point.x.detach()) < before
    if wrong == "sign":
        assert all(ratio == pytest.approx(-1.0, rel=1e-6) for ratio in ratios)
        assert len(told) == 1
        assert issubclass(told[0].category, AdaptiveBilevelWarning)
        assert "hypergradient.check" in str(told[0].message)
    assert min(ratios) < 0


@pytest.mark.filterwarnings(RARE)
def test_the_wrong_sign_is_told_after_twenty_steps() -> None:
    point, inner, outer = both(solver=EXACT)
    for k in range(20):
        inner.step(point.lower)
        point.x.grad = -implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
        if k < 19:
            outer.step(point.upper)
        else:
            with pytest.warns(AdaptiveBilevelWarning, match="for 20 steps .* disagree") as caught:
                outer.step(point.upper)
            assert caught[0].filename == __file__


@pytest.mark.filterwarnings(RARE)
def test_the_fallback_is_the_step_of_the_right_hypergradient() -> None:
    for direction in ("sgd", "adam"):
        ends = []
        for sign in (1.0, -1.0):
            point, inner, outer = both(solver=EXACT, direction=direction)
            for _ in range(4):
                inner.step(point.lower)
                point.x.grad = sign * implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
                outer.step(point.upper)
            ends.append(point.x.detach().clone())
        assert torch.allclose(ends[0], ends[1], rtol=1e-6)


def test_a_wrong_hypergradient_in_a_box() -> None:
    from adaptive_bilevel.optim.projection import Box

    problem = random_qb(2)
    point = problem.instance(torch.zeros(3))
    inner = SLS([point.y], 1.0, lower_bound=None)
    outer: Any = BiSLS([point.x], 1.0, lower=inner, solver=EXACT, project=Box(-0.5, 0.5))
    before = problem.F(point.x.detach())
    for _ in range(10):
        inner.step(point.lower)
        point.x.grad = -implicit(point.upper, point.lower, [point.x], [point.y], EXACT)[0]
        outer.step(point.upper)
        assert float(point.x.detach().abs().max()) <= 0.5
    assert problem.F(point.x.detach()) < before


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("blind", [Identity(0.1), Neumann(3, 0.1, random=True)], ids=str)
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_blind_solver_is_no_model_of_the_response(blind: Any, direction: str) -> None:
    """The hypergradient is the identity's; y answers as CG says, whatever that does to the slope, and no word of it."""
    ends = []
    for solver in (blind, CG()):
        torch.manual_seed(0)
        point, inner, outer = both(lr=None, solver=solver, direction=direction)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if solver is blind else "ignore")
            for _ in range(5):
                inner.step(point.lower)
                point.x.grad = implicit(point.upper, point.lower, [point.x], [point.y], Identity(1e-2))[0]
                outer.step(point.upper)
                assert outer.record.slope > 0.0
        ends.append([point.x.tolist(), point.y.tolist(), outer.record.slope, torch.get_rng_state().tolist()])
    assert ends[0] == ends[1]


def test_where_cg_does_not_descend_a_blind_solver_has_its_own_response() -> None:
    """The lower loss is concave: CG ends at once, with no response and a slope of zero."""
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    lower = lambda: (torch.cos(y) - x * y).sum()  # noqa: E731
    upper = lambda: ((y - 1.0) ** 2).sum()  # noqa: E731
    outer = BiSLS([x], lower=torch.optim.SGD([y], 0.1), solver=Identity(0.1), curvature=math.inf)
    (h,) = implicit(upper, lower, [x], [y], Identity(0.1))
    x.grad = h
    outer.step(upper, lower)
    assert outer.record is not None and outer.record.moved
    assert outer.record.slope_ratio == pytest.approx(1.0)
    assert outer.record.slope == pytest.approx(float(h @ h))


@pytest.mark.parametrize("cls, step", [(BiSLS, 0.4), (BiSPS, 0.1)])
def test_the_record_in_words(cls: Any, step: float) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    outer: Any = cls([x], step)
    assert not outer.record
    x.grad = torch.tensor([4.0])
    loss = outer.step(lambda: x.square().sum())
    assert float(loss) == 4.0
    assert f"step {step} (proposed" in outer.record.describe()
    assert Outcome(outer.record.outcome).sentence in outer.record.describe()
    assert outer.record.describe() in repr(outer)
    assert outer.param_groups[0]["step_size"] == step
    x.grad = torch.zeros(1)
    outer.step(lambda: x.square().sum())
    assert "the gradient is zero" in outer.record.describe()
    assert outer.param_groups[0]["step_size"] == step
