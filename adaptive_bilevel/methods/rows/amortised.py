"""Methods that track v, the solution of H v = f_y, in the place of a linear solve."""

from __future__ import annotations

from ...hypergradient import Amortised
from ..directions import Saga, Spider, Storm
from ..row import Row
from .parts import STEP, STRONG, OldWeight, decaying

__all__ = ["ROWS"]

ROWS = (
    Row(
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
    ),
    Row(
        name="soba",
        summary="y, v and x at once, one product of each kind",
        source="Dagréou et al., 2022, arXiv 2201.13409",
        assumes=f"{STRONG}, f with Lipschitz Hessian; steps of the order k^-1/2; rate eps^-2",
        order="yvx",
        estimator=Amortised(),
        upper_step=decaying(0.5),
        lower_step=decaying(0.5),
        auxiliary_step=decaying(0.5),
    ),
    Row(
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
    ),
    Row(
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
    ),
    Row(
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
    ),
)
