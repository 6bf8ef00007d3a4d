"""The policies as `torch.optim.Optimizer`: one conduct, one guard, two directions, and the upper level."""

from .bisls import BiSLS
from .bisps import BiSPS
from .evaluations import Counts, Evaluations
from .line_search import SLS, SLSB
from .polyak import SPSB, DecSPS, SPSMax
from .projection import Ball, Box, Simplex

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "Ball",
    "BiSLS",
    "BiSPS",
    "Box",
    "Counts",
    "DecSPS",
    "Evaluations",
    "SPSMax",
    "Simplex",
]
