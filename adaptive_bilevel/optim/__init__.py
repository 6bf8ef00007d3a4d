"""The rules as instances of `torch.optim.Optimizer`: line searches and Polyak steps, and convex sets."""

from .auto_sls import AutoSLS
from .line_search import SLS, SLSB
from .polyak import SPSB, DecSPS, SPSMax
from .projection import Ball, Box, Simplex

__all__ = ["SLS", "SLSB", "SPSB", "AutoSLS", "Ball", "Box", "DecSPS", "SPSMax", "Simplex"]
