"""Automatic step sizes for bilevel optimization.

Optimizers (they need PyTorch, which is imported when one is first named): `SPSMax`, `DecSPS`, `SPSB` (Polyak steps),
`SLS`, `SLSB` (line searches), `BiSPS`, `BiSLS` (upper levels; `Box`, `Ball` and `Simplex` constrain them). The rules
themselves are in `adaptive_bilevel.policies`, hypergradient estimators in `adaptive_bilevel.hypergradient`, and
the literature's algorithms, to compare with, in `adaptive_bilevel.methods`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hypergradient, methods, policies
    from .optim import SLS, SLSB, SPSB, Ball, BiSLS, BiSPS, Box, DecSPS, Simplex, SPSMax

__version__ = "0.1.0"

_OPTIMIZERS = ("SPSMax", "DecSPS", "SPSB", "SLS", "SLSB", "BiSPS", "BiSLS", "Ball", "Box", "Simplex")

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "Ball",
    "BiSLS",
    "BiSPS",
    "Box",
    "DecSPS",
    "SPSMax",
    "Simplex",
    "hypergradient",
    "methods",
    "policies",
]


def __getattr__(name: str) -> Any:
    if name in _OPTIMIZERS:
        return getattr(importlib.import_module(".optim", __name__), name)
    if name in ("policies", "hypergradient", "methods", "optim", "errors"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
