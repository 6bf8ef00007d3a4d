"""How much of a predicted move is kept: the minimizer of the mean of the parabolas along the moves so far."""

from __future__ import annotations

import math

import pytest

from adaptive_bilevel.bilevel.share import Parabola, Share


def test_the_share_is_that_of_the_mean_of_moves() -> None:
    """Minimizers at 0, 1, 0, 1, ...: the parabolas (0, 1) and (-2/3, 1/3) add up to one with its own at 1/4."""
    share = Share()
    for minimizer in [0.0, 1.0] * 40:
        share = share.after(Parabola(-2.0 * minimizer, 1.0))
    assert 0.2 < share.value < 0.3


@pytest.mark.parametrize(
    ("slope", "bend", "value"),
    [(-1.0, -2.0, 1.0), (1.0, -2.0, 0.0), (-1.0, 0.0, 1.0), (-1.0, 1.0, 0.5), (-9.0, 1.0, 1.0), (1.0, 1.0, 0.0)],
)
def test_one_parabola(slope: float, bend: float, value: float) -> None:
    assert Share().after(Parabola(slope, bend)).value == value


def test_what_is_not_finite_or_flat_shows_nothing() -> None:
    known = Share(-1.0, 1.0)
    for bad in (math.nan, math.inf, -math.inf):
        assert known.after(Parabola(bad, 1.0)) == known.after(Parabola(1.0, bad)) == known
    assert known.after(Parabola(0.0, 0.0)) == known
    assert Share().value == 1.0


def test_it_knows_no_unit_of_the_loss() -> None:
    one, two = (Share().after(Parabola(-2.0 * unit, 3.0 * unit)) for unit in (1.0, 1e9))
    assert one == two


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0, 1.7])
def test_a_parabola_by_its_slope_anywhere(share: float) -> None:
    """-2 gamma + 5 gamma^2."""
    assert Parabola.at(share, -2.0 + 10.0 * share, 10.0) == pytest.approx((-2.0, 5.0), rel=1e-12)
