"""Derivatives through the lower loop, or through one virtual step of it."""

from __future__ import annotations

from ...hypergradient import DARTS, Unroll, UnrollForward
from ...policies import Constant
from ..directions import Adam, Momentum
from ..row import Row
from .parts import STEP

__all__ = ["ROWS"]

ROWS = (
    Row(
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
    ),
    Row(
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
    ),
    Row(
        name="unroll-truncated",
        summary="differentiate through the last K lower steps, warm-started",
        source="Shaban et al., 2019, arXiv 1810.10667",
        assumes="g strongly convex near the solution; bias (1 - b mu)^K",
        order="y,x",
        estimator=Unroll(last=5),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
    Row(
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
    ),
)
