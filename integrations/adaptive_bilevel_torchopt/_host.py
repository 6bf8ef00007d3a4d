"""TorchOpt itself, or the command that installs it; and names for what it takes and returns."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch.autograd.graph import Node as Node

from adaptive_bilevel.errors import pass_over

__all__ = ["Memory", "Module", "Node", "Transformation", "Tree", "torchopt"]

try:
    import torchopt
except ImportError as error:
    if error.name != "torchopt":  # it is installed, and to install it again would change nothing
        raise ImportError(
            f"adaptive_bilevel_torchopt: TorchOpt is installed, but importing it failed: {error}"
        ) from error
    raise ImportError(
        "adaptive_bilevel_torchopt needs TorchOpt, which is not installed here. Run\n\n"
        "    pip install 'adaptive-bilevel[torchopt]'\n"
    ) from error

pass_over("torchopt", "adaptive_bilevel_torchopt")

Module: TypeAlias = torchopt.nn.ImplicitMetaGradientModule
"""A module whose ``solve()`` is differentiated implicitly."""

Transformation: TypeAlias = torchopt.base.GradientTransformation
"""A pair of functions ``init(params)`` and ``update(updates, state, *, params, inplace)``."""

Tree: TypeAlias = Any
"""A tensor, or a nesting of lists, tuples and dictionaries of tensors (optree has no type for it)."""

Memory: TypeAlias = Any
"""What a transformation keeps between updates: a tree of its own making."""
