"""Implicit differentiation after a lower loop, or beside one lower step."""

from __future__ import annotations

from ...hypergradient import CG, Averaged, Exact, Implicit
from ..row import Row
from .parts import RANDOM, STEP, STRONG, SUM, decaying

__all__ = ["ROWS"]

ROWS = (
    Row(
        name="ba",
        summary="T lower steps, then a step along the exact implicit gradient",
        source="Ghadimi & Wang, 2018, arXiv 1802.02246, Algorithm 1",
        assumes=f"{STRONG}; full gradients, small d_y",
        order="y,x",
        estimator=Implicit(Exact()),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
    Row(
        name="bsa",
        summary="BA on samples: one random term of the Neumann series",
        source="Ghadimi & Wang, 2018, arXiv 1802.02246, Algorithm 3",
        assumes=f"{STRONG}; bounded variances; T grows with k; rate eps^-2 (f), eps^-3 (g)",
        order="y,x",
        estimator=RANDOM,
        upper_step=decaying(0.5),
        lower_step=decaying(0.5),
        lower_steps=10,
    ),
    Row(
        name="aid-bio",
        summary="approximate implicit differentiation: conjugate gradients, warm-started",
        source="Ji, Yang & Liang, 2021, arXiv 2010.07962, Algorithm 1",
        assumes=f"{STRONG}; deterministic",
        order="y,x",
        estimator=Implicit(CG(max_iterations=10, tolerance=0.0, warm_start=True)),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
    Row(
        name="stocbio",
        summary="warm-started lower loop, Neumann sum on minibatches",
        source="Ji, Yang & Liang, 2021, arXiv 2010.07962, Algorithm 2",
        assumes=f"{STRONG}; bounded variances, batches of 1/eps; rate eps^-2",
        order="y,x",
        estimator=SUM,
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
    Row(
        name="alset",
        summary="alternating SGD with one time scale",
        source="Chen, Sun & Yin, 2021, arXiv 2106.13781",
        assumes=f"{STRONG}; bounded variances; both steps of the order 1/sqrt(K); rate eps^-2",
        order="y,x",
        estimator=RANDOM,
        upper_step=decaying(0.5),
        lower_step=decaying(0.5),
    ),
    Row(
        name="ttsa",
        summary="one lower step per upper step, on two time scales",
        source="Hong, Wai, Wang & Yang, 2023, arXiv 2007.05170",
        assumes=f"{STRONG}; steps k^-3/5, k^-2/5 (strongly convex F: 1/k, k^-2/3); rate eps^-5/2; x in a convex set",
        order="y,x",
        estimator=RANDOM,
        upper_step=decaying(0.6),
        lower_step=decaying(0.4),
    ),
    Row(
        name="stable",
        summary="one time scale: y also answers to the move of x; recursively averaged H and C",
        source="Chen, Sun, Xiao & Yin, 2022, arXiv 2102.04671",
        assumes=f"{STRONG}; both steps of the order 1/sqrt(K); rate eps^-2; small d_y",
        order="yx",
        estimator=Averaged(0.9),
        upper_step=decaying(0.5),
        lower_step=decaying(0.5),
        correction="tangent",
    ),
)
