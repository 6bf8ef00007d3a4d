"""Which step size goes with which row, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_bilevel import SLS, methods, policies
from adaptive_bilevel.errors import AdaptiveBilevelError, OptionError
from adaptive_bilevel.hypergradient import CG, Amortised, Implicit, ValueFunction
from adaptive_bilevel.methods import rows
from tests.methods.helpers import finite, run
from tests.problems import b2, ridge_hpo

RULES: dict[str, Any] = {
    "SLS": policies.SLS(),
    "SLSB": policies.SLSB(bound=1.0),
    "SPSMax": policies.SPSMax(bound=1.0),
    "SPSB": policies.SPSB(),
    "DecSPS": policies.DecSPS(bound=1.0),
    "Envelope": policies.Envelope(bound=1.0, floor=1e-3),
    "GradientNorm": policies.GradientNorm(initial=10.0),
    "Constant": policies.Constant(bound=0.01, decay="inverse_sqrt"),
}
POLYAK = ("SPSMax", "SPSB", "DecSPS", "Envelope")
SEARCHES = ("SLS", "SLSB")


def allowed(name: str, level: str, rule: str) -> bool:
    """What the mathematics allows, said once more in the words of the issue."""
    row = rows.ROWS[name]
    if rule not in (*POLYAK, *SEARCHES):
        return True
    direction = row.upper_direction if level == "upper" or (row.joint and level == "y") else row.lower_direction
    if isinstance(direction, (methods.Storm, methods.Spider, methods.Saga)):
        return False
    if level == "upper" and row.joint:
        return False
    return not (level == "upper" and isinstance(row.estimator, ValueFunction))


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend", "ignore:.*disagree")
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("name", methods.names())
def test_every_row_with_every_rule(name: str, level: str) -> None:
    problem = ridge_hpo()
    for rule, policy in RULES.items():
        options: dict[str, Any] = {f"{level}_step": policy}
        if rows.ROWS[name].lower_steps > 1 and not rows.ROWS[name].until:
            options["lower_steps"] = 2
        if allowed(name, level, rule):
            assert finite(run(name, problem, 2, **options)), rule
        else:
            with pytest.raises(OptionError, match=rf"methods\.run\('{name}'\), step of "):
                run(name, problem, 3, **options)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stocbio", {"lower_step": policies.SPSB(lower_bound=None)}, "needs a lower bound"),
    ("stocbio", {"upper_step": policies.SPSB(lower_bound=None)}, "needs a lower bound"),
    ("soba", {"auxiliary_step": policies.SPSB()}, "no known lower bound"),
    ("sustain", {"upper_step": policies.SLS()}, "Armijo's condition may fail"),
    ("sustain", {"lower_step": policies.SPSB()}, "Polyak's ratio"),
    ("saba", {"upper_step": policies.SLS()}, "no gradient of the sampled loss"),
    ("bome", {"upper_step": policies.SLS()}, "one joint direction"),
    ("f2sa", {"upper_step": policies.SPSB()}, "no known lower bound"),
    ("f2sa", {"upper_step": policies.SLS(start=1.0)}, "certifies nothing"),
    ("bisls-sgd", {"upper_direction": methods.Momentum()}, "knows the directions"),
    ("stocbio", {"upper_direction": methods.Saga()}, "sum over samples"),
    ("unroll", {"lower_direction": methods.Adam()}, "plain lower steps"),
    ("unroll", {"order": "x,y"}, "before x"),
    ("unroll", {"upper_direction": methods.Storm()}, "second point"),
    ("soba", {"order": "y,x"}, "uses v"),
    ("f2sa", {"multiplier": None}, "lambda"),
    ("soba", {"correction": "tangent"}, "correction"),
    ("stocbio", {"order": "y,x,y"}, "nothing twice"),
    ("stocbio", {"order": "yw"}, "name groups"),
    ("stocbio", {"order": "y,,x"}, "nothing twice"),
    ("stocbio", {"lower_steps": 0}, "lower_steps"),
    ("stocbio", {"lower_steps": 1.5}, "lower_steps"),
    ("stocbio", {"upper_step": -1.0}, "bound"),
    ("stocbio", {"upper_step": "0.1"}, "upper_step"),
    ("stocbio", {"upper_step": SLS}, "upper_step"),
    ("stocbio", {"upper_step": policies.SLS}, "upper_step"),
    ("stocbio", {"learning_rate": 0.1}, "no such option"),
    ("stocbio", {"project": "box"}, "project"),
    ("stocbio", {"solver": "cg"}, "solver"),
    ("stocbio", {"clock": "seconds"}, "clock"),
    ("stocbio", {"estimator": "cg"}, "estimator"),
    ("stocbio", {"estimator": Implicit}, "estimator"),
    ("stocbio", {"upper_direction": "adam"}, "upper_direction"),
    ("stocbio", {"lower_direction": methods.Adam}, "lower_direction"),
    ("stocbio", {"response": "one"}, "response"),
    ("bisls-sgd", {"response": "step", "curvature": 9.0}, r"curvature=9.0, response='step'.*leave"),
    ("bisls-sgd", {"response": "step", "carry": "auto"}, r"carry='auto', response='step'.*leave"),
    ("bisls-sgd", {"response": "step", "momentum": "auto"}, r"momentum='auto', response='step'.*True or False"),
    (
        "bisls-sgd",
        {"response": "step", "solver": CG(3), "estimator": Amortised(), "order": "yvx"},
        r"solver=CG\(.*leave",
    ),
    ("bisls-sgd", {"response": "step", "upper_step": policies.SLS(max_step=1.0)}, r"max_step=1.0.*leave"),
    ("bisls-sgd", {"response_steps": 1}, r"response_steps=1, response='tangent'.*leave"),
    ("bisls-adam", {"baseline": "paper"}, r"baseline='paper', response='tangent'.*leave"),
    ("bisls-sgd", {"response": "step", "baseline": "none"}, "baseline"),
    ("bisls-sgd", {"order": "yx", "carry": True}, r"carry=True, order='yx'.*order='y,x'"),
    ("stocbio", {"response": "step"}, r"response='step'.*not searched.*SLS"),
    ("stocbio", {"curvature": 0.5}, r"curvature=0.5.*not searched.*SLS"),
    ("bisps", {"carry": False}, r"carry=False.*not searched.*SLS"),
    ("soba", {"momentum": True}, r"momentum=True.*not searched.*SLS"),
    ("stocbio", {"baseline": "matched"}, r"baseline='matched'.*not searched.*SLS"),
    ("stocbio", {"lower": methods.LowerLoss}, "lower"),
    ("stocbio", {"start": {"x": "first"}}, "start"),
    ("soba", {"solver": CG()}, "solves nothing"),
    ("f2sa", {"multiplier": 3.0}, "multiplier"),
    ("d-tfbo", {"tolerance": 0.0}, "tolerance"),
    ("stable", {"correction": "inside"}, "correction"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED, ids=str)
def test_refusals_say_why(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdaptiveBilevelError, match=reason) as caught:
        run(name, b2(), 2, **options)
    assert isinstance(caught.value, ValueError)
