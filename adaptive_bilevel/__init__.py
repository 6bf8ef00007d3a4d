"""Automatic step sizes for bilevel optimization.

* Lower level, and single-level problems: `AutoSLS`, `SLS`, `SLSB` (line searches), `SPSB`, `SPSMax`, `DecSPS` (Polyak
  steps).
* Upper level: `BiSLS`, `BiSPS`, `OneStepBiSLS`. `Box`, `Ball` and `Simplex` are constraints.
* `diagnose` returns what limits a run, `monitor` a step as a dict of scalars, and `plot` draws a run.
* `hypergradient`: hypergradients, linear solvers, and a check of any hypergradient.
* `policies`: the rules over scalars, without PyTorch.
* `methods`: the algorithms of the literature.

PyTorch is imported when an optimizer is first named.
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
