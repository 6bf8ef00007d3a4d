"""STORM and SPIDER at both levels, with an implicit hypergradient."""

from __future__ import annotations

from ..directions import Spider, Storm
from ..row import Row
from .parts import RANDOM, STEP, STRONG, SUM, OldWeight, decaying

__all__ = ["ROWS"]

ROWS = (
    Row(
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
    ),
    Row(
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
    ),
    Row(
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
    ),
)
