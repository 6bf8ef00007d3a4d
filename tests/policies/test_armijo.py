"""The inequality of sufficient decrease, written once."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adaptive_bilevel.policies import SLS, armijo_ceiling, armijo_threshold


@given(
    *(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-6, 1e3), st.floats(0.01, 0.99), st.floats(0.0, 1.0)),
    st.sampled_from([0.0, 2.0**-52, 2.0**-23]),
)
def test_a_search_accepts_up_to_the_threshold(
    loss: float, slope: float, step: float, c: float, slack: float, rounding: float
) -> None:
    options = {"c": c, "slack": slack, "rounding": rounding}
    most = armijo_threshold(loss, slope, step, **options)
    assert most == loss + slack + rounding * abs(loss) - c * step * slope
    policy = SLS(start=step, c=c, slack=slack, max_trials=1, lower_bound=None)
    for value, passes in (
        (most, True),
        (math.nextafter(most, math.inf), False),
        *((value, False) for value in (math.nan, math.inf, -math.inf)),
    ):
        sample: dict[str, Any] = {"loss": loss, "slope": slope, "rounding": rounding}
        record, _ = policy.step(policy.init(), trial=lambda a, value=value: value, **sample)
        assert record.moved == passes


def test_no_step_above_the_ceiling_passes() -> None:
    ceiling = armijo_ceiling(2.0, 4.0, 0.5, c=0.25)
    assert armijo_threshold(2.0, 4.0, ceiling, c=0.25) == 0.5
