"""Hypergradients for code that brings none, the linear solvers behind them, and a check of anyone's hypergradient.

>>> import torch
>>> from adaptive_bilevel import hypergradient
>>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
>>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
>>> g = lambda: (y**2 - x * y).sum()
>>> hypergradient.assign([x], hypergradient.implicit(f, g, [x], [y], hypergradient.CG(tolerance=1e-3)))
>>> x.grad
tensor([0.9000])
"""

from .check import CheckReport, DirectionCheck, Verdict, check
from .curvature import LowerCurvature, PartialGradients, partial_gradients
from .implicit import ImplicitInfo, assign, implicit, implicit_with_info
from .solution import LinearSolver, Solution, SolverStatus
from .solvers import CG, Identity, Neumann

__all__ = [
    "CG",
    "CheckReport",
    "DirectionCheck",
    "Identity",
    "ImplicitInfo",
    "LinearSolver",
    "LowerCurvature",
    "Neumann",
    "PartialGradients",
    "Solution",
    "SolverStatus",
    "Verdict",
    "assign",
    "check",
    "implicit",
    "implicit_with_info",
    "partial_gradients",
]
