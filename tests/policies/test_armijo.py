"""The inequality of sufficient decrease, written once."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel.policies import SLS, armijo_ceiling, armijo_threshold, sufficient_decrease
from tests.policies.test_rules import take


@given(
    *(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-6, 1e3), st.floats(0.01, 0.99), st.floats(0.0, 1.0)),
    st.sampled_from([0.0, 2.0**-52, 2.0**-23]),
)
def test_the_threshold_is_the_largest_value_that_is_a_decrease(
    loss: float, slope: float, step: float, c: float, slack: float, rounding: float
) -> None:
    options = {"c": c, "slack": slack, "rounding": rounding}
    most = armijo_threshold(loss, slope, step, **options)
    assert most == loss + slack + rounding * abs(loss) - c * step * slope
    assert sufficient_decrease(most, loss, slope, step, **options)
    assert not sufficient_decrease(math.nextafter(most, math.inf), loss, slope, step, **options)
    for value in (math.nan, math.inf, -math.inf):
        assert not sufficient_decrease(value, loss, slope, step, **options)


@given(st.floats(-0.1, 2.5), st.floats(0.01, 0.9))
def test_a_search_accepts_by_that_inequality(value: float, c: float) -> None:
    record, _ = take(SLS(start=0.25, c=c, max_trials=1, lower_bound=-1e3), trial=lambda step: value, rounding=0.0)
    assert record.moved == sufficient_decrease(value, 2.0, 4.0, 0.25, c=c)


def test_no_step_above_the_ceiling_passes() -> None:
    ceiling = armijo_ceiling(2.0, 4.0, 0.5, c=0.25)
    assert armijo_threshold(2.0, 4.0, ceiling, c=0.25) == 0.5
