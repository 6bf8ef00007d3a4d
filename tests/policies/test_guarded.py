"""GuardedSLS: SLS where samples agree, and a bound from the steps so far where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel.policies import SLS, GuardedSLS, Outcome, SearchState


def walk(policy: SLS, losses: list[float], curvatures: list[float]) -> tuple[list[float], SearchState]:
    """Take steps on samples f_j(x) = curvature x^2 whose variable starts anew where the loss is the one given."""
    state, steps = policy.init(), []
    for loss, curvature in zip(losses, curvatures, strict=True):
        x = math.sqrt(loss / curvature)
        slope = (2.0 * curvature * x) ** 2
        record, state = policy.step(
            state,
            loss=loss,
            slope=slope,
            trial=lambda a, c=curvature, x=x: c * (x - a * 2.0 * c * x) ** 2,
        )
        steps.append(float(record.step_size))
    return steps, state


@pytest.mark.parametrize("curvature", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("start", [None, 1e-3, 1e3])
def test_on_one_function_the_steps_are_those_of_sls(curvature: float, start: float | None) -> None:
    runs = []
    for rule in (SLS, GuardedSLS):
        policy, x, steps = rule(start=start, reset="grow" if start is None else "keep"), 3.0, []
        state = policy.init()
        for _ in range(30):
            f, g = curvature * x * x, 2.0 * curvature * x
            if g == 0.0:
                break
            record, state = policy.step(
                state, loss=f, slope=g * g, trial=lambda a, x=x, g=g: curvature * (x - a * g) ** 2
            )
            x -= record.step_size * g
            steps.append(record.step_size)
        runs.append(steps)
        assert state.margin >= 0.0
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.01 * 2.0**k for k in (*range(9), 7)]),  # steps up to 1.8 pass; the search ends at 1.28
        ({"max_step": 0.2}, [0.01, 0.02, 0.04, 0.08, 0.16]),
        ({"max_trials": 4}, [0.01, 0.02, 0.04, 0.08]),
        ({"reset": "keep"}, [0.01]),
    ],
    ids=repr,
)
def test_a_first_search_goes_up_from_a_trial_that_passes(options: dict[str, Any], expected: list[float]) -> None:
    policy, tried = GuardedSLS(start=0.01, **options), list[float]()

    def trial(step: float) -> float:
        tried.append(step)
        return (2.0 - 2.0 * step) ** 2 / 2.0

    record, state = policy.step(policy.init(), loss=2.0, slope=4.0, trial=trial)
    assert tried == pytest.approx(expected)
    assert (record.step_size, record.trials) == (tried[-1], len(tried))
    assert policy.step(state, loss=2.0, slope=4.0, trial=trial)[0].trials <= 2  # later ones do not


def test_steps_that_only_fit_their_own_sample_become_shorter() -> None:
    """Each sample is fitted in one step, and the next one is as bad as the first."""
    steps, state = walk(GuardedSLS(), [1.0] * 60, [1.0] * 60)
    free, _ = walk(SLS(), [1.0] * 60, [1.0] * 60)
    assert state.margin < 0.0
    assert min(free) > 0.2
    assert steps[0] == free[0]
    assert steps[-1] == pytest.approx(math.sqrt(state.squares / state.mean_slope / 60), rel=0.05)
    assert max(steps[30:]) < 0.75 * max(free[30:])


def test_the_bound_is_at_least_the_rms_of_the_steps_so_far() -> None:
    known = {"count": 8, "found": 1.0, "previous": 5.0, "seen": 8, "mean_slope": 2.0, "squares": 64.0, "gains": 9.0}
    state = SearchState(**known, distance=4.0, margin=-1.0)  # type: ignore[arg-type]
    record, _ = GuardedSLS().step(state, loss=1e6, slope=1.0, trial=lambda a: 0.0)
    assert record.step_size == pytest.approx(math.sqrt(64.0 / 2.0 / 9.0))
    assert record.outcome == Outcome.at_bound
    record, _ = GuardedSLS().step(state._replace(distance=256.0), loss=1e6, slope=1.0, trial=lambda a: 0.0)
    assert record.step_size == pytest.approx(math.sqrt(256.0 / 2.0 / 9.0))
    record, _ = GuardedSLS().step(state._replace(margin=0.0), loss=1e6, slope=1.0, trial=lambda a: 0.0)
    assert record.step_size == 6.0
    record, _ = GuardedSLS(max_step=0.5).step(state, loss=1e6, slope=1.0, trial=lambda a: 0.0)
    assert record.step_size == 0.5


KNOWN = {"count": 8, "found": 1.0, "previous": 5.0, "seen": 8, "mean_slope": 2.0, "squares": 64.0, "gains": 1.0}


@pytest.mark.parametrize(
    ("onward", "before", "bounded"),
    [
        (-1.0, 0.0, True),
        (0.04, 0.0, True),
        (0.06, 0.0, False),  # c / 2 = .05 of gains of 1
        (None, 0.0, True),
        (0.002, 0.01, True),  # by less than 2 standard errors
        (0.002, 0.03, False),
    ],
)
def test_steps_along_which_losses_go_on_falling_are_not_at_fault(
    onward: float | None, before: float, bounded: bool
) -> None:
    state = SearchState(**KNOWN, margin=-1.0, onward=before, onward_squares=2e-4)  # type: ignore[arg-type]
    record, after = GuardedSLS().step(state, loss=1e6, slope=1.0, trial=lambda a: 0.0, onward=onward)
    assert (record.outcome == Outcome.at_bound) == bounded
    assert after.onward == pytest.approx(before + (onward or 0.0))
    assert after.onward_squares == pytest.approx(2e-4 + (onward or 0.0) ** 2)


FLAT = {"count": 8, "found": 1.0, "previous": 1.0, "seen": 8, "mean_slope": 1.0, "mean_loss": 2.0, "margin": 1.0}


def jumping(rise: float, least: float, *, part: float = 0.4) -> Callable[[float], float]:
    """From 2 with a slope of -1; f rises by a jump at `least`, and falls by a part of the slope from there."""
    return lambda a: 2.0 - a if a < least else 2.0 + rise - part * a


@pytest.mark.parametrize(
    ("rise", "tried", "step"),
    [
        (0.0, [0.5, 0.25, 0.125], 0.125),  # no jump: .4 of the slope never passes with c = .5, until the first piece
        (0.05, [0.5, 0.25, 0.5], 0.5),  # the part falls at .25: back to the lowest value
        (0.45, [0.5, 0.25, 0.125], 0.125),  # the lowest value is no decrease
    ],
)
def test_a_first_search_goes_back_where_the_loss_jumps(rise: float, tried: list[float], step: float) -> None:
    seen, f = list[float](), jumping(rise, 0.2)

    def trial(a: float) -> float:
        seen.append(a)
        return f(a)

    record, state = GuardedSLS(start=0.5, c=0.5).step(SearchState(), loss=2.0, slope=1.0, trial=trial)
    assert seen == tried
    assert (record.step_size, record.trials, record.value) == (step, len(tried), f(step))
    assert state.previous == step


@pytest.mark.parametrize(
    ("deviation", "step", "trials", "resumed"),
    [
        (0.02, 0.6, 4, 1.2),  # a rise that is usual: back, and the next search continues from the trial before
        (0.015, 1.2 / 2**7, 8, math.sqrt(1.2 * 1.2 / 2**7)),  # a larger one: on to where f does not jump
    ],
)
def test_a_later_search_bears_a_jump_that_is_usual(deviation: float, step: float, trials: int, resumed: float) -> None:
    state = SearchState(**FLAT, loss_variance=deviation**2)  # type: ignore[arg-type]
    f = jumping(0.05, 0.01, part=0.02)
    record, after = GuardedSLS().step(state, loss=2.0, slope=1.0, trial=lambda a: f(a) + max(a - 1.0, 0.0))
    assert (record.step_size, record.trials, record.outcome) == (step, trials, Outcome.accepted)
    assert record.value == f(step)
    assert after.previous == pytest.approx(resumed)


def test_a_trial_that_is_gone_back_to_is_certified() -> None:
    state = SearchState(**FLAT, loss_variance=1.0)  # type: ignore[arg-type]
    asked, f = list[float](), jumping(0.05, 0.01, part=0.02)

    def certify(a: float) -> bool:
        asked.append(a)
        return a < 0.01

    record, after = GuardedSLS().step(state, loss=2.0, slope=1.0, trial=f, certify=certify)
    assert asked == [1.2, 0.3, 0.075, 1.2 / 2**7]
    assert record.step_size == asked[-1]
    assert after.previous == pytest.approx(math.sqrt(1.2 * asked[-1]))


def test_a_trial_whose_value_is_another_one_now_is_not_gone_back_to() -> None:
    state, tried = SearchState(**FLAT, loss_variance=1.0), list[float]()  # type: ignore[arg-type]
    f = jumping(0.05, 0.01, part=0.02)

    def trial(a: float) -> float:
        tried.append(a)
        return f(a) + 1e-3 * tried.count(a)

    record, after = GuardedSLS(c=0.05).step(state, loss=2.0, slope=1.0, trial=trial)
    assert tried[:3] == [1.2, 0.6, 1.2]
    assert tried.count(1.2) == 2
    assert record.step_size == tried[-1] < 0.01
    assert after.previous == pytest.approx(math.sqrt(1.2 * tried[-1]))


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0.0, 10.0)), min_size=1, max_size=4),
    st.floats(0.0, 1e3),
    st.floats(1e-2, 1e2),
)
def test_no_search_goes_back_on_a_convex_loss(kinks: list[tuple[float, float]], curvature: float, start: float) -> None:
    def f(a: float) -> float:
        return 2.0 - a + curvature * a * a + math.fsum(more * max(a - at, 0.0) for at, more in kinks)

    state = SearchState(**{**FLAT, "previous": start}, loss_variance=4.0)  # type: ignore[arg-type]
    record, _ = GuardedSLS(c=0.5).step(state, loss=2.0, slope=1.0, trial=f)
    plain, _ = SLS(c=0.5).step(state, loss=2.0, slope=1.0, trial=f)
    assert record == plain


def test_units_do_not_matter() -> None:
    """f in units of 1e-9 and x in units of 1e6: steps in units of 1e21, all decisions the same."""
    losses = [1.0, 0.5, 2.0, 1.0, 3.0, 1.5, 2.5, 1.0] * 4
    steps, _ = walk(GuardedSLS(), losses, [1.0] * len(losses))
    scaled, _ = walk(GuardedSLS(), [1e-9 * f for f in losses], [1e-21] * len(losses))
    assert scaled == pytest.approx([1e21 * a for a in steps], rel=1e-9)


def test_a_step_that_does_not_move_leaves_no_trace() -> None:
    policy = GuardedSLS()
    _, state = walk(policy, [1.0] * 5, [1.0] * 5)
    for loss, slope in ((math.nan, 1.0), (1.0, math.inf), (1.0, 0.0), (1.0, -1.0)):
        record, after = policy.step(state, loss=loss, slope=slope, trial=lambda a: 0.0)
        assert not record.moved
        assert after == state
    record, after = policy.step(state, loss=1.0, slope=1.0, trial=lambda a: 2.0)
    assert record.outcome == Outcome.search_failed
    assert after == state


@pytest.mark.parametrize(("largest", "goes_on"), [(0.5, 0.5), (0.2, 2.0**-1.5), (1e-5, 2.0**-8.5), (0.0, 1.0)])
def test_a_search_that_is_cut_far_goes_on_from_the_geometric_mean(largest: float, goes_on: float) -> None:
    """From 1, halved until it is not above `largest`: 1/2, 1/8, 2^-17. Where nothing passes: from the last.

    f is flat beyond, so the second of the rejected trials shows that it is not convex.
    """
    policy = GuardedSLS(start=1.0, grow=1.0)
    record, state = policy.step(policy.init(), loss=1.0, slope=1e-3, trial=lambda a: 1.0 - a if a <= 1.0 else 2.0)
    assert record.step_size == 1.0
    record, state = policy.step(state, loss=0.5, slope=1e-3, trial=lambda a: 0.5 - a if a <= largest else 2.0)
    assert record.moved == (largest > 0.0)
    assert policy.first_trial(state, loss=1.0, slope=1e-3) == pytest.approx(goes_on, rel=1e-12)
