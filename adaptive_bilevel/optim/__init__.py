"""The policies as `torch.optim.Optimizer`: one conduct, two directions, Polyak steps and line searches."""

from .line_search import SLS, SLSB
from .polyak import SPSB, DecSPS, SPSMax
from .projection import Ball, Box, Simplex

__all__ = ["SLS", "SLSB", "SPSB", "Ball", "Box", "DecSPS", "SPSMax", "Simplex"]
