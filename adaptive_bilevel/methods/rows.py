"""The algorithms of the literature, each as one `Row`. Step sizes are placeholders: give those of your problem.

Exponents of decaying steps are those of the papers. Where a paper's pseudocode is misprinted, the row is what its
analysis uses (`Row.correction` and `Row.order` give the printed variants).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hypergradient import (
    CG,
    DARTS,
    HOZOG,
    PZOBO,
    Amortised,
    Averaged,
    Exact,
    Implicit,
    Neumann,
    Unroll,
    UnrollForward,
    ValueFunction,
)
from ..policies import SLS, SPSB, Constant, Envelope, GradientNorm, PowerDecay
from .directions import Adam, Momentum, Saga, Spider, Storm
from .fields import PenalisedLoss, SecondLower
from .multipliers import Ascent, Balance, Growth
from .row import Row

__all__ = ["ROWS"]

STRONG = "g strongly convex in y; Lipschitz gradients and Hessians"
STEP = Constant(bound=0.1)
SUM = Implicit(Neumann(steps=10, scale=0.1))
RANDOM = Implicit(Neumann(steps=10, scale=0.1, random=True))


def decaying(exponent: float, bound: float = 0.1) -> Constant:
    """Return the step bound (k+1)^-exponent."""
    return Constant(bound=bound, decay=PowerDecay(exponent))


@dataclass(frozen=True)
class OldWeight:
    """1 - c (k+1)^-exponent, the weight of the old direction in STORM."""

    exponent: float
    c: float = 1.0

    def __call__(self, k: int) -> float:
        """Return the weight of iteration k."""
        return max(0.0, 1.0 - self.c * float((k + 1) ** -self.exponent))


BA = Row(
    name="ba",
    summary="T lower steps, then a step along the exact implicit gradient",
    source="Ghadimi & Wang, 2018, arXiv 1802.02246, Algorithm 1",
    assumes=f"{STRONG}; full gradients, small d_y",
    order="y,x",
    estimator=Implicit(Exact()),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
BSA = Row(
    name="bsa",
    summary="BA on samples: one random term of the Neumann series",
    source="Ghadimi & Wang, 2018, arXiv 1802.02246, Algorithm 3",
    assumes=f"{STRONG}; bounded variances; T grows with k; rate eps^-2 (f), eps^-3 (g)",
    order="y,x",
    estimator=RANDOM,
    upper_step=decaying(0.5),
    lower_step=decaying(0.5),
    lower_steps=10,
)
AID_BIO = Row(
    name="aid-bio",
    summary="approximate implicit differentiation: conjugate gradients, warm-started",
    source="Ji, Yang & Liang, 2021, arXiv 2010.07962, Algorithm 1",
    assumes=f"{STRONG}; deterministic",
    order="y,x",
    estimator=Implicit(CG(max_iterations=10, tolerance=0.0, warm_start=True)),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
STOCBIO = Row(
    name="stocbio",
    summary="warm-started lower loop, Neumann sum on minibatches",
    source="Ji, Yang & Liang, 2021, arXiv 2010.07962, Algorithm 2",
    assumes=f"{STRONG}; bounded variances, batches of 1/eps; rate eps^-2",
    order="y,x",
    estimator=SUM,
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
ALSET = Row(
    name="alset",
    summary="alternating SGD with one time scale",
    source="Chen, Sun & Yin, 2021, arXiv 2106.13781",
    assumes=f"{STRONG}; bounded variances; both steps of the order 1/sqrt(K); rate eps^-2",
    order="y,x",
    estimator=RANDOM,
    upper_step=decaying(0.5),
    lower_step=decaying(0.5),
)
TTSA = Row(
    name="ttsa",
    summary="one lower step per upper step, on two time scales",
    source="Hong, Wai, Wang & Yang, 2023, arXiv 2007.05170",
    assumes=f"{STRONG}; steps k^-3/5, k^-2/5 (strongly convex F: 1/k, k^-2/3); rate eps^-5/2; x in a convex set",
    order="y,x",
    estimator=RANDOM,
    upper_step=decaying(0.6),
    lower_step=decaying(0.4),
)
STABLE = Row(
    name="stable",
    summary="one time scale: y also answers to the move of x; recursively averaged H and C",
    source="Chen, Sun, Xiao & Yin, 2022, arXiv 2102.04671",
    assumes=f"{STRONG}; both steps of the order 1/sqrt(K); rate eps^-2; small d_y",
    order="yx",
    estimator=Averaged(0.9),
    upper_step=decaying(0.5),
    lower_step=decaying(0.5),
    correction="tangent",
)
SUSTAIN = Row(
    name="sustain",
    summary="STORM momentum at both levels, single loop",
    source="Khanduri et al., 2021, arXiv 2102.07367",
    assumes=f"{STRONG}; steps (k+1)^-1/3, momentum 1 - c (k+1)^-2/3; rate eps^-3/2",
    order="yx",
    estimator=RANDOM,
    upper_step=decaying(1 / 3),
    lower_step=decaying(1 / 3),
    upper_direction=Storm(OldWeight(2 / 3)),
    lower_direction=Storm(OldWeight(2 / 3)),
)
MRBO = Row(
    name="mrbo",
    summary="SUSTAIN with the Neumann sum",
    source="Yang, Ji & Liang, 2021, arXiv 2106.04692, Algorithm 1",
    assumes=f"{STRONG}; steps and momentum as SUSTAIN; rate eps^-3/2",
    order="yx",
    estimator=SUM,
    upper_step=decaying(1 / 3),
    lower_step=decaying(1 / 3),
    upper_direction=Storm(OldWeight(2 / 3)),
    lower_direction=Storm(OldWeight(2 / 3)),
)
VRBO = Row(
    name="vrbo",
    summary="SPIDER at both levels: a large batch every period, differences in between",
    source="Yang, Ji & Liang, 2021, arXiv 2106.04692, Algorithm 2",
    assumes=f"{STRONG}; large batches now and then; rate eps^-3/2",
    order="x,y",
    estimator=SUM,
    upper_step=STEP,
    lower_step=STEP,
    upper_direction=Spider(period=10),
    lower_direction=Spider(period=10),
    lower_steps=3,
)
FSLA = Row(
    name="fsla",
    summary="fully single loop: y, then v, then x along a STORM direction",
    source="Li, Gu & Huang, 2022, arXiv 2112.04660",
    assumes=f"{STRONG}; steps and new weight of the order k^-1/2; rate eps^-2",
    order="y,v,x",
    estimator=Amortised(),
    upper_step=decaying(0.5),
    lower_step=decaying(0.5),
    auxiliary_step=decaying(0.5),
    upper_direction=Storm(OldWeight(0.5)),
)
SOBA = Row(
    name="soba",
    summary="y, v and x at once, one product of each kind",
    source="Dagréou et al., 2022, arXiv 2201.13409",
    assumes=f"{STRONG}, f with Lipschitz Hessian; steps of the order k^-1/2; rate eps^-2",
    order="yvx",
    estimator=Amortised(),
    upper_step=decaying(0.5),
    lower_step=decaying(0.5),
    auxiliary_step=decaying(0.5),
)
SABA = Row(
    name="saba",
    summary="SOBA with SAGA's tables, for finite sums",
    source="Dagréou et al., 2022, arXiv 2201.13409",
    assumes=f"{STRONG}; finite sums of n and m terms; constant steps; rate (n+m)^2/3 eps^-1",
    order="yvx",
    estimator=Amortised(),
    upper_step=STEP,
    lower_step=STEP,
    auxiliary_step=STEP,
    upper_direction=Saga(),
    lower_direction=Saga(),
)
SRBA = Row(
    name="srba",
    summary="SOBA with SARAH's recursion, for finite sums",
    source="Dagréou, Moreau, Vaiter & Ablin, 2024, arXiv 2302.08766",
    assumes=f"{STRONG}; finite sums of n and m terms; constant steps; rate (n+m)^1/2 eps^-1",
    order="yvx",
    estimator=Amortised(),
    upper_step=STEP,
    lower_step=STEP,
    auxiliary_step=STEP,
    upper_direction=Spider(period=10),
    lower_direction=Spider(period=10),
)
AMIGO = Row(
    name="amigo",
    summary="warm-started loops for y and for v, then x",
    source="Arbel & Mairal, 2022, arXiv 2111.14580",
    assumes=f"{STRONG}; rate eps^-2",
    order="y,v,x",
    estimator=Amortised(),
    upper_step=STEP,
    lower_step=STEP,
    auxiliary_step=STEP,
    lower_steps=10,
    auxiliary_steps=10,
)
PZOBO_ROW = Row(
    name="pzobo",
    summary="Hessian-free: the response of the lower loop by finite differences",
    source="Sow, Ji & Liang, 2022, arXiv 2110.07004",
    assumes=f"{STRONG}; small d_x, since the variance grows with it",
    order="y,x",
    estimator=PZOBO(directions=5),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
HOZOG_ROW = Row(
    name="hozog",
    summary="zeroth order in x: values of f after the lower loop only",
    source="Gu et al., 2021, arXiv 2102.09026",
    assumes="F smooth; small d_x, since the variance grows with it",
    order="y,x",
    estimator=HOZOG(directions=5),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
UNROLL = Row(
    name="unroll",
    summary="differentiate through the whole lower loop, reverse mode",
    source="Franceschi et al., 2017, arXiv 1703.01785",
    assumes="g smooth; the gradient is that of f(x, y_T(x)); memory grows with T",
    order="y,x",
    estimator=Unroll(),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
    start={"y": "first"},
)
UNROLL_FORWARD = Row(
    name="unroll-forward",
    summary="the same gradient in forward mode: no memory of iterates, d_x times the products",
    source="Franceschi et al., 2017, arXiv 1703.01785",
    assumes="g smooth; small d_x",
    order="y,x",
    estimator=UnrollForward(),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
    start={"y": "first"},
)
UNROLL_TRUNCATED = Row(
    name="unroll-truncated",
    summary="differentiate through the last K lower steps, warm-started",
    source="Shaban et al., 2019, arXiv 1810.10667",
    assumes="g strongly convex near the solution; bias (1 - b mu)^K",
    order="y,x",
    estimator=Unroll(last=5),
    upper_step=STEP,
    lower_step=STEP,
    lower_steps=10,
)
DARTS_ROW = Row(
    name="darts",
    summary="one virtual lower step, its derivative by finite differences",
    source="Liu, Simonyan & Yang, 2019, arXiv 1806.09055",
    assumes="none proved; bias of one unrolled step",
    order="x,y",
    estimator=DARTS(step=0.1),
    upper_step=Constant(bound=0.01),
    lower_step=STEP,
    upper_direction=Adam(betas=(0.5, 0.999)),
    lower_direction=Momentum(0.9),
)
S_TFBO = Row(
    name="s-tfbo",
    summary="tuning-free single loop: inverse accumulated gradient norms, coupled",
    source="Tuning-Free Bilevel Optimization, 2024, arXiv 2410.05140",
    assumes=f"{STRONG}; deterministic; rate eps^-1 log^4(1/eps)",
    order="yvx",
    estimator=Amortised(),
    upper_step=GradientNorm(coupling="product"),
    lower_step=GradientNorm(),
    auxiliary_step=GradientNorm(coupling="max"),
    couplings={"v": "y", "x": "yv"},
)
D_TFBO = Row(
    name="d-tfbo",
    summary="tuning-free double loop: cold-started norms, each loop until its gradient is small",
    source="Tuning-Free Bilevel Optimization, 2024, arXiv 2410.05140",
    assumes=f"{STRONG}; deterministic; rate eps^-1 iterations, eps^-2 gradients",
    order="y,v,x",
    estimator=Amortised(),
    upper_step=GradientNorm(),
    lower_step=GradientNorm(),
    auxiliary_step=GradientNorm(),
    lower_steps=10_000,
    auxiliary_steps=10_000,
    until="yv",
    cold="yv",
)
BISPS = Row(
    name="bisps",
    summary="Polyak steps at both levels, each under a decaying bound",
    source="Fan et al., 2023, arXiv 2305.18666, eqs. (11), (12)",
    assumes=f"{STRONG}; f bounded below over (x, y); rate K^-1/2, T growing with K",
    order="y,x",
    estimator=SUM,
    upper_step=Envelope(decay="inverse_sqrt"),
    lower_step=SPSB(decay="inverse_sqrt"),
    lower_steps=10,
)
BISLS_SGD = Row(
    name="bisls-sgd",
    summary="line searches at both levels; the upper one follows the tangent of y*(x)",
    source="Fan et al., 2023, arXiv 2305.18666, Algorithms 2 and 3 (response='step'); see the README for the tangent",
    assumes=f"{STRONG}; no rate proved",
    order="y,x",
    estimator=Implicit(CG()),
    upper_step=SLS(c=0.5),
    lower_step=SLS(),
    lower_steps=10,
)
BISLS_ADAM = Row(
    name="bisls-adam",
    summary="BiSLS-SGD along Adam's direction at the upper level",
    source="Fan et al., 2023, arXiv 2305.18666, Algorithm 2",
    assumes=f"{STRONG}; no rate proved",
    order="y,x",
    estimator=Implicit(CG()),
    upper_step=SLS(c=0.1),
    lower_step=SLS(),
    upper_direction=Adam(),
    lower_steps=10,
)
F2SA = Row(
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
)
PGDO = Row(
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
)
BOME = Row(
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
)
PRIMAL_DUAL = Row(
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
)

ROWS: dict[str, Row] = {row.name: row for row in list(globals().values()) if isinstance(row, Row)}
