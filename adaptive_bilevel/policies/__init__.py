"""Step-size policies: scalars in, scalars out; no framework is imported.

A policy is a frozen dataclass of options. `policy.init()` gives its state, and ``policy.propose(state, context)``, or
``policy.step(state, loss=..., slope=...)`` with the `Context` as keywords, returns a `Record` and the next state.
Losses and slopes may be Python numbers, or 0-dim arrays and tensors of NumPy, PyTorch or JAX; the closed-form rules
also run inside ``vmap``, ``jit`` and ``torch.compile``. Policies never raise or warn at a step: they report
(`Outcome`).

Rules, by their names in the literature: `SPSMax`, `DecSPS`, `SPSB` (Polyak), `SLS`, `SLSB` (line search), `Envelope`
(any raw step between a floor and a bound), `GradientNorm` (tuning-free), `Constant`. Searches of this package:
`AutoSLS`, for the lower level, and `GuardedSLS`, for the upper one.
"""

from .armijo import armijo_ceiling, armijo_threshold
from .auto_sls import AutoSLS
from .context import Certificate, Context, Policy, Trial
from .envelope import Constant, Envelope
from .gradient_norm import GradientNorm, GradientNormState
from .guarded import GuardedSLS
from .polyak import SPSB, DecSPS, SPSMax
from .record import Outcome, Record
from .reset import reset
from .schedule import PowerDecay, decay_factor
from .sls import SLS, SLSB
from .state import BoundState, DecSPSState, SearchState, State

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "AutoSLS",
    "BoundState",
    "Certificate",
    "Constant",
    "Context",
    "DecSPS",
    "DecSPSState",
    "Envelope",
    "GradientNorm",
    "GradientNormState",
    "GuardedSLS",
    "Outcome",
    "Policy",
    "PowerDecay",
    "Record",
    "SPSMax",
    "SearchState",
    "State",
    "Trial",
    "armijo_ceiling",
    "armijo_threshold",
    "decay_factor",
    "reset",
]
