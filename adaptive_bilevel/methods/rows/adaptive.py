"""Methods that find their step sizes: accumulated gradient norms, Polyak steps, line searches."""

from __future__ import annotations

from ...hypergradient import Amortised, Implicit, Lanczos
from ...policies import SLS, SPSB, Envelope, GradientNorm
from ..directions import Adam
from ..row import Row
from .parts import STRONG, SUM

__all__ = ["ROWS"]

ROWS = (
    Row(
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
    ),
    Row(
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
    ),
    Row(
        name="bisps",
        summary="Polyak steps at both levels, each under a decaying bound",
        source="Fan et al., 2023, arXiv 2305.18666, eqs. (11), (12)",
        assumes=f"{STRONG}; f bounded below over (x, y); rate K^-1/2, T growing with K",
        order="y,x",
        estimator=SUM,
        upper_step=Envelope(decay="inverse_sqrt"),
        lower_step=SPSB(decay="inverse_sqrt"),
        lower_steps=10,
    ),
    Row(
        name="bisls-sgd",
        summary="line searches at both levels; the upper one follows the tangent of y*(x)",
        source="Fan et al., 2023, arXiv 2305.18666, Algorithms 2, 3 (response='step'); tangent: docs/bilevel.md",
        assumes=f"{STRONG}; no rate proved",
        order="y,x",
        estimator=Implicit(Lanczos()),
        upper_step=SLS(c=0.5),
        lower_step=SLS(),
        lower_steps=10,
    ),
    Row(
        name="bisls-adam",
        summary="BiSLS-SGD along Adam's direction at the upper level",
        source="Fan et al., 2023, arXiv 2305.18666, Algorithm 2",
        assumes=f"{STRONG}; no rate proved",
        order="y,x",
        estimator=Implicit(Lanczos()),
        upper_step=SLS(c=0.1),
        lower_step=SLS(),
        upper_direction=Adam(),
        lower_steps=10,
    ),
)
