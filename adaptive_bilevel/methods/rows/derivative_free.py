"""Methods without products: the lower loop runs again at other x."""

from __future__ import annotations

from ...hypergradient import HOZOG, PZOBO
from ..row import Row
from .parts import STEP, STRONG

__all__ = ["ROWS"]

ROWS = (
    Row(
        name="pzobo",
        summary="Hessian-free: the response of the lower loop by finite differences",
        source="Sow, Ji & Liang, 2022, arXiv 2110.07004",
        assumes=f"{STRONG}; small d_x, since the variance grows with it",
        order="y,x",
        estimator=PZOBO(directions=5),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
    Row(
        name="hozog",
        summary="zeroth order in x: values of f after the lower loop only",
        source="Gu et al., 2021, arXiv 2102.09026",
        assumes="F smooth; small d_x, since the variance grows with it",
        order="y,x",
        estimator=HOZOG(directions=5),
        upper_step=STEP,
        lower_step=STEP,
        lower_steps=10,
    ),
)
