"""Step-size policies: scalars in, scalars out; no framework is imported.

A policy is a frozen dataclass of options. `policy.init()` gives its state, and
``policy.step(state, loss=..., slope=...)`` returns a `Record` and the next state. Losses and slopes may be Python
numbers, or 0-dim arrays and tensors of NumPy, PyTorch or JAX; the closed-form rules also run inside ``vmap``, ``jit``
and ``torch.compile``. Policies never raise or warn at a step: they report (`Outcome`).

Rules, by their names in the literature: `SPSMax`, `DecSPS`, `SPSB` (Polyak), `SLS`, `SLSB` (line search), `Envelope`
(any raw step between a floor and a bound), `GradientNorm` (tuning-free), `Constant`.
"""

from .armijo import SLS, SLSB, SearchState
from .envelope import BoundState, Constant, Envelope, armijo_ceiling
from .gradient_norm import GradientNorm, GradientNormState
from .polyak import SPSB, DecSPS, DecSPSState, SPSMax
from .record import Outcome, Policy, Record, Trial
from .reset import reset
from .schedule import PowerDecay, decay_factor

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "BoundState",
    "Constant",
    "DecSPS",
    "DecSPSState",
    "Envelope",
    "GradientNorm",
    "GradientNormState",
    "Outcome",
    "Policy",
    "PowerDecay",
    "Record",
    "SPSMax",
    "SearchState",
    "Trial",
    "armijo_ceiling",
    "decay_factor",
    "reset",
]
