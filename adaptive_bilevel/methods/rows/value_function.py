"""First-order methods through the value function min_z g(x, z), with a weight lambda."""

from __future__ import annotations

from ...hypergradient import ValueFunction
from ..fields import PenalisedLoss, SecondLower
from ..multipliers import Ascent, Balance, Growth
from ..row import Row
from .parts import STEP, STRONG, decaying

__all__ = ["ROWS"]

ROWS = (
    Row(
        name="f2sa",
        summary="fully first order: y on f + lambda g, z on g, lambda growing",
        source="Kwon, Kwon, Wright & Nowak, 2023, arXiv 2301.10945",
        assumes=f"{STRONG}; lambda > L_f / mu; rate eps^-7/2, deterministic eps^-3/2",
        order="y,z,x",
        estimator=ValueFunction(),
        upper_step=decaying(5 / 7),
        lower_step=decaying(4 / 7),
        auxiliary_step=decaying(4 / 7),
        lower_steps=10,
        lower=PenalisedLoss(),
        multiplier=Growth(initial=1.0, increment=0.1, exponent=1 / 7),
    ),
    Row(
        name="pgdo",
        summary="penalty gradient descent (V-PBGD): x and y along f + lambda (g - v), lambda ramped up",
        source="Shen & Chen, 2023, arXiv 2302.05185",
        assumes="g satisfies the Polyak-Lojasiewicz inequality in y; lambda of the order eps^-1/2",
        order="z,yx",
        estimator=ValueFunction(normalise=True),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
        lower=PenalisedLoss(normalise=True),
        joint=True,
        multiplier=Growth(initial=0.1, increment=0.1, largest=10.0),
    ),
    Row(
        name="bome",
        summary="x and y along f's gradient plus as much of q's as makes q decrease",
        source="Liu, Ye, Wright, Stone & Liu, 2022, arXiv 2209.08709",
        assumes="g satisfies the Polyak-Lojasiewicz inequality in y; q = g(x, y) - g(x, z)",
        order="z,yx",
        estimator=ValueFunction(),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
        lower=PenalisedLoss(),
        start={"z": "y"},
        joint=True,
        multiplier=Balance(eta=0.5),
    ),
    Row(
        name="primal-dual",
        summary="descent in (x, y), ascent in lambda, on f + lambda (g - v_a) with the smoothed value function v_a",
        source="Sow, Ji, Guan & Liang, 2022, arXiv 2203.01123",
        assumes="g convex in y (several minimizers allowed); v_a by (26) with a_1, a_2 > 0",
        order="z,yx",
        estimator=ValueFunction(),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
        lower=PenalisedLoss(),
        lower_copy=SecondLower(ridge=1e-3),
        joint=True,
        multiplier=Ascent(step=0.1, ridge=1e-3, slack=1e-3),
    ),
)
