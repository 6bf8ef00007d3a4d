"""What a policy sees of a step: one record, the same by keywords; and rules of one's own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adaptive_bilevel.policies import Context, Outcome, Policy, Record
from tests.policies.helpers import every_policy, halved_square


@every_policy
def test_a_context_is_the_keywords_of_a_step(policy: Policy[Any]) -> None:
    sample: dict[str, Any] = {"loss": 2.0, "slope": 4.0, "trial": halved_square, "lower_bound": 0.5, "rounding": 0.0}
    for context in (sample, {**sample, "bound": 0.25, "cap": 0.2, "scale": 2.0, "certify": lambda step: step < 0.15}):
        by_keywords, by_context = policy.init(), policy.init()
        for _ in range(3):
            expected, by_keywords = policy.step(by_keywords, **context)
            found, by_context = policy.propose(by_context, Context(**context))
            assert repr(found) == repr(expected)
            assert by_context == by_keywords


@every_policy
def test_unknown_keywords_of_a_step_raise(policy: Any) -> None:
    with pytest.raises(TypeError, match="momentum"):
        policy.step(policy.init(), loss=2.0, slope=4.0, momentum=0.9)


def test_a_rule_of_one_s_own() -> None:
    class Halved(Policy[int]):
        def init(self) -> int:
            return 0

        def propose(self, state: int, context: Context) -> tuple[Record, int]:
            step = context.loss / (2.0 * context.slope)
            return Record(step, step, math.inf, Outcome.accepted), state + 1

    rule = Halved()
    record, state = rule.step(rule.init(), loss=2.0, slope=4.0)
    assert (record.step_size, state) == (0.25, 1)
