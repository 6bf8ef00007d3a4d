"""Automatic step sizes for TorchOpt's implicit solvers and gradient transformations.

* Implicit solvers: `LowerStep` steps inside the ``solve()`` of an ``ImplicitMetaGradientModule``, `FunctionalLowerStep`
  inside a function that ``custom_root`` decorates, `UpperStep` steps on the meta-parameters with TorchOpt's
  hypergradient, along the gradient, Adam's direction or any GradientTransformation (`Transformed`).
* Gradient transformations: `scale_by_spsmax`, `scale_by_decsps`, `scale_by_spsb`, `scale_by_sls`, `scale_by_slsb`
  (`scale_by_policy` for the rest), `chain` and `FuncOptimizer` that pass the loss on to them, and `spsmax` ... `slsb`
  in the place of ``torchopt.sgd``. `PolyakLR` is a learning rate for TorchOpt's own chains and optimizers.
"""

from ._host import torchopt as _torchopt  # noqa: F401  first: says how to install TorchOpt where it is missing
from .chain import FuncOptimizer, chain, decsps, sls, slsb, spsb, spsmax
from .direction import Transformed
from .functional import FunctionalLowerStep
from .learning_rate import PolyakLR
from .lower import LowerStep
from .transform import (
    GradientTransformationExtraArgs,
    ScaleByPolicyState,
    scale_by_decsps,
    scale_by_policy,
    scale_by_sls,
    scale_by_slsb,
    scale_by_spsb,
    scale_by_spsmax,
)
from .upper import UpperStep

__all__ = [
    "FuncOptimizer",
    "FunctionalLowerStep",
    "GradientTransformationExtraArgs",
    "LowerStep",
    "PolyakLR",
    "ScaleByPolicyState",
    "Transformed",
    "UpperStep",
    "chain",
    "decsps",
    "scale_by_decsps",
    "scale_by_policy",
    "scale_by_sls",
    "scale_by_slsb",
    "scale_by_spsb",
    "scale_by_spsmax",
    "sls",
    "slsb",
    "spsb",
    "spsmax",
]
