"""What is known of steps that are too long, and what is not any more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.bilevel.scale import Scale
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.policies import SLS as Rule
from adaptive_bilevel.policies import Outcome, Record, SearchState


def searched(step: float, value: float, trials: int = 1) -> Record:
    outcome = Outcome.accepted if step else Outcome.search_failed
    return Record(step, step, math.inf, outcome, trials, value, 2.0)


@pytest.mark.parametrize(
    ("step", "value", "trials", "shortest", "after"),
    [
        (0.5, 9.5, 3, math.inf, {"rejected": True, "shortest": 1.0}),
        (0.0, 11.0, 40, 1.0, {"rejected": True, "shortest": math.inf}),
        (1.5, 7.0, 1, 1.0, {}),  # not outgrown
        (2.5, 5.1, 1, 1.0, {"shortest": 0.0}),
        (2.5, 4.0, 1, 0.0, {"shortest": 0.0}),  # it falls faster than its slope
        (2.5, 6.0, 1, 1.0, {"shortest": math.inf}),  # outgrown, but near the minimizer of its parabola
    ],
)
def test_what_a_search_has_shown(
    step: float, value: float, trials: int, shortest: float, after: dict[str, Any]
) -> None:
    scale = Scale(SearchState(previous=1.0), True, shortest)
    assert scale.after(searched(step, value, trials), Rule(), 10.0, 1e-16) == {"kept": 0, **after}


@pytest.mark.parametrize(("shortest", "grow"), [(1.0, 1.2), (math.inf, 1.2), (0.0, 2.0)])
def test_searches_double_again_where_nothing_is_known_to_be_too_long(shortest: float, grow: float) -> None:
    assert Scale(SearchState(previous=1.0), True, shortest).policy(Rule()).grow == grow


@pytest.mark.parametrize(("kept", "grow"), [(0, 1.2), (3, 1.2**4), (10**9, 1e6)])
def test_kept_steps_let_a_search_start_as_much_longer(kept: int, grow: float) -> None:
    """As searches in their place would have; a million times at most."""
    scale = Scale(SearchState(previous=1.0), True, 1.0, kept)
    assert scale.policy(Rule()).grow == pytest.approx(grow)
    step = searched(0.5, 0.0, 0)._replace(outcome=Outcome.kept)
    assert scale.after(step, Rule(), 10.0, 1e-16) == {"kept": kept + 1}
    assert scale.after(step, Rule(), 10.0, 1.0) == {}  # below the rounding of f, nothing could have grown


@pytest.mark.parametrize("decades", [4, 6])
def test_a_first_step_decades_too_short_is_outgrown(decades: int) -> None:
    """The first hypergradient and upper loss are of another scale than all later ones."""
    x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    inner = SLS([y])
    outer = BiSLS([x], lower=inner, momentum=False)
    scale = 10.0**decades
    losses = []
    for k in range(8 + 4 * decades):

        def lower() -> torch.Tensor:
            return 0.5 * ((y - x) ** 2).sum()

        def upper(factor: float = scale if k == 0 else 1.0) -> torch.Tensor:
            return 0.5 * factor * ((y - 20.0) ** 2).sum()

        for _ in range(3):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y]))
        outer.step(upper)
        losses.append(0.5 * float(((x.detach() - 20.0) ** 2).sum()))
    assert losses[-1] < 0.01 * losses[0]
