"""The upper level of a bilevel problem: `BiSLS` and `BiSPS`."""

from .bisls import BiSLS
from .bisps import BiSPS

__all__ = ["BiSLS", "BiSPS"]
