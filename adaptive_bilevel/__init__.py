"""Automatic step sizes for bilevel optimization.

Optimizers (they need PyTorch, which is imported when one is first named): `SPSMax`, `DecSPS`, `SPSB` (Polyak steps),
`SLS`, `SLSB`, `AutoSLS` (line searches), `BiSPS`, `BiSLS` (upper levels; `Box`, `Ball` and `Simplex` constrain them).
The rules themselves are in `adaptive_bilevel.policies`, hypergradient estimators in `adaptive_bilevel.hypergradient`,
and the literature's algorithms, to compare with, in `adaptive_bilevel.methods`. `diagnose` says what limits a run,
`monitor` gives a step as a dict of scalars, and `plot` draws a run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hypergradient, methods, policies
    from .bilevel import BiSLS, BiSPS, OneStepBiSLS, diagnose, monitor, plot
    from .optim import SLS, SLSB, SPSB, AutoSLS, Ball, Box, DecSPS, Simplex, SPSMax

__version__ = "0.1.0"

_HOMES = {
    "bilevel": ("BiSPS", "BiSLS", "OneStepBiSLS", "diagnose", "monitor", "plot"),
    "optim": ("SPSMax", "DecSPS", "SPSB", "SLS", "SLSB", "AutoSLS", "Ball", "Box", "Simplex"),
}
_SUBPACKAGES = ("bilevel", "errors", "evaluation", "hypergradient", "methods", "optim", "policies")

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "AutoSLS",
    "Ball",
    "BiSLS",
    "BiSPS",
    "Box",
    "DecSPS",
    "OneStepBiSLS",
    "SPSMax",
    "Simplex",
    "diagnose",
    "hypergradient",
    "methods",
    "monitor",
    "plot",
    "policies",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
