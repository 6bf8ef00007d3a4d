"""The policies as `torch.optim.Optimizer`: one conduct, two directions, Polyak steps and line searches."""

from .auto_sls import AutoSLS
from .line_search import SLS, SLSB
from .polyak import SPSB, DecSPS, SPSMax
from .projection import Ball, Box, Simplex

__all__ = ["SLS", "SLSB", "SPSB", "AutoSLS", "Ball", "Box", "DecSPS", "SPSMax", "Simplex"]
