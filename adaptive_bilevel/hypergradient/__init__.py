"""Hypergradients for code that has none, the linear solvers behind them, and a check of any hypergradient.

>>> import torch
>>> from adaptive_bilevel import hypergradient
>>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
>>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
>>> g = lambda: (y**2 - x * y).sum()
>>> hypergradient.assign([x], hypergradient.implicit(f, g, [x], [y], hypergradient.CG(tolerance=1e-3)))
>>> x.grad
tensor([0.9000])

The estimators of the literature (`Implicit`, `Amortised`, `Averaged`, `Unroll`, `UnrollForward`, `DARTS`, `PZOBO`,
`HOZOG`, `ValueFunction`) are pure functions of a `Point` and a `Sample` over an `Oracle` that counts its calls;
`adaptive_bilevel.methods` runs them.
"""

from .assign import assign
from .cg import CG
from .check import CheckReport, DirectionCheck, Verdict, check
from .curvature import LowerCurvature, PartialGradients, partial_gradients
from .differences import DARTS, HOZOG, PZOBO
from .estimate import Estimate, Estimator, Point, Visit, descend
from .estimators import Amortised, Averaged, Implicit, linear_residual
from .exact import Exact
from .implicit import ImplicitInfo, implicit, implicit_with_info
from .lanczos import Lanczos
from .oracle import LowerGradients, Oracle
from .penalty import ValueFunction
from .sample import Sample
from .solution import HessianReport, LinearSolver, Solution, SolverStatus
from .solvers import Identity, Neumann
from .unroll import Unroll, UnrollForward

__all__ = [
    "CG",
    "DARTS",
    "HOZOG",
    "PZOBO",
    "Amortised",
    "Averaged",
    "CheckReport",
    "DirectionCheck",
    "Estimate",
    "Estimator",
    "Exact",
    "HessianReport",
    "Identity",
    "Implicit",
    "ImplicitInfo",
    "Lanczos",
    "LinearSolver",
    "LowerCurvature",
    "LowerGradients",
    "Neumann",
    "Oracle",
    "PartialGradients",
    "Point",
    "Sample",
    "Solution",
    "SolverStatus",
    "Unroll",
    "UnrollForward",
    "ValueFunction",
    "Verdict",
    "Visit",
    "assign",
    "check",
    "descend",
    "implicit",
    "implicit_with_info",
    "linear_residual",
    "partial_gradients",
]
