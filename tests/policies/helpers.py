"""Policies with a sample to step on."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_bilevel.policies import (
    SLS,
    SLSB,
    SPSB,
    AutoSLS,
    Constant,
    DecSPS,
    Envelope,
    GradientNorm,
    GuardedSLS,
    Policy,
    Record,
    SPSMax,
)

CLOSED: dict[str, Policy[Any]] = {
    "constant": Constant(bound=0.5, decay="inverse"),
    "spsmax": SPSMax(bound=0.5),
    "decsps": DecSPS(bound=0.5),
    "spsb": SPSB(bound=0.5),
    "envelope": Envelope(bound=0.5, floor=0.1),
    "gradient_norm": GradientNorm(),
}
SEARCHES: dict[str, Policy[Any]] = {
    "sls": SLS(start=0.5),
    "slsb": SLSB(bound=0.5),
    "sls_found": SLS(),
    "auto_sls": AutoSLS(),
    "guarded": GuardedSLS(),
}
POLICIES = {**CLOSED, **SEARCHES}

BOUNDED = {name: policy for name, policy in POLICIES.items() if name != "gradient_norm"}

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_bounded = pytest.mark.parametrize("policy", BOUNDED.values(), ids=BOUNDED)
every_closed_form = pytest.mark.parametrize("policy", CLOSED.values(), ids=CLOSED)
every_search = pytest.mark.parametrize("policy", SEARCHES.values(), ids=SEARCHES)


def halved_square(step: float) -> float:
    """f(x - step g) of f(x) = x^2 / 2 at x = 2: loss 2, slope 4."""
    return 0.5 * (2.0 - 2.0 * step) ** 2


def take(policy: Policy[Any], state: Any = None, **sample: Any) -> tuple[Record, Any]:
    """A step on a sample of x^2 / 2 at x = 2, in the parts that are not given."""
    sample = {"loss": 2.0, "slope": 4.0, "trial": halved_square, **sample}
    return policy.step(policy.init() if state is None else state, **sample)
