"""The policies as `torch.optim.Optimizer`: one conduct, two directions, Polyak steps and line searches."""

from .line_search import SLS, SLSB
from .projection import Ball, Box, Simplex
from .sps import SPSB, DecSPS, SPSMax

__all__ = ["SLS", "SLSB", "SPSB", "Ball", "Box", "DecSPS", "SPSMax", "Simplex"]
