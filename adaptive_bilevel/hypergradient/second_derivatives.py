"""Whether the lower loss has the second derivatives that products with H and C need, and what to do where it has not.

Some operations have none: fused attention, cuDNN's recurrent layers, compiled functions, reentrant checkpoints. Torch
raises there, and `explained` adds the ways out. A custom ``autograd.Function`` may have wrong ones without an error: if
its backward detaches, uses NumPy, or is ``once_differentiable``, a part of the products is missing. So where a lower
loss holds such a function, products are compared with differences of its gradients, once for the lower tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from adaptive_bilevel.errors import SolverError

from ..evaluation.graph import nodes
from ..evaluation.guard import Guard
from ..evaluation.interception import in_full_precision
from ..evaluation.processes import mean
from ..evaluation.reductions import on_host
from ..evaluation.tensors import gradients_of
from ..evaluation.vectors import dot, rounding

__all__ = ["custom_functions", "explained", "verify"]

_OUT = (
    "Ways out: evaluate the lower loss with operations that can be differentiated twice "
    "(torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around attention, torch.backends.cudnn.flags(enabled=False) "
    "around recurrent layers, checkpoint(..., use_reentrant=False), no torch.compile), take products by differences "
    "(products='difference'), or use estimators without products (adaptive_bilevel.hypergradient.DARTS, ValueFunction)"
)
_SIGNS = (
    "is not implemented",
    "double backward",
    "twice a function",
    "use_reentrant=True",
    "not compatible with .grad()",
    "requires create_graph=False",
)
"""What torch says where there are no second derivatives."""

_TOLERANCE = 0.1
"""Relative difference above which products are wrong: differences are coarse."""

_looked_at: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def explained(error: RuntimeError, name: str) -> SolverError | None:
    """Return the error in the place of one of torch's that says that second derivatives are missing; else None.

    Args:
        error: Torch's.
        name: Whose loss was differentiated.
    """
    text = str(error)
    if not any(sign in text.lower() if sign.islower() else sign in text for sign in _SIGNS):
        return None
    return SolverError(f"{name}: its loss cannot be differentiated twice ({text.splitlines()[0]}). {_OUT}.")


def custom_functions(loss: Tensor) -> list[str]:
    """Return the names of the custom autograd functions in a graph, sorted."""
    custom: Any = torch.autograd.function.BackwardCFunction
    found = (node.name() for node in nodes([loss.grad_fn]) if isinstance(node, custom))
    return sorted({name.removesuffix("Backward") for name in found})


def verify(
    guard: Guard, closure: Any, loss: Tensor, upper: Sequence[Tensor], lower: Sequence[Tensor]
) -> SolverError | None:
    """Compare products with differences where a loss holds custom functions, and return the error where they differ.

    It is done once for the lower tensors, at four evaluations of the closure; without such functions, there is none.

    Args:
        guard: Of these tensors, with a mark.
        closure: Returns the lower loss.
        loss: That loss, with its graph.
        upper: The tensors of x.
        lower: The tensors of y.
    """
    if lower[0] in _looked_at:
        return None
    _looked_at[lower[0]] = True
    names = custom_functions(loss)
    moving = [p for p in lower if p.requires_grad]
    if not names or not all(p.is_leaf for p in moving):
        return None
    inputs = [*(p for p in upper if p.requires_grad), *moving]
    with in_full_precision():
        difference = _difference(guard, closure, inputs, moving)
    if not difference > _TOLERANCE:
        return None
    return SolverError(
        f"the second derivatives of the lower loss differ from differences of its gradients by {difference:.0%}: "
        f"the backward of {', '.join(names)} cannot be differentiated itself (it detaches, uses NumPy, or is "
        "once_differentiable, say), so the hypergradient misses a part. Write that backward with operations of "
        f"torch on ctx.saved_tensors. {_OUT}"
    )


def _difference(guard: Guard, closure: Any, inputs: Sequence[Tensor], lower: Sequence[Tensor]) -> float:
    """Return how far products are from differences, relative to both; 0 where that cannot be told."""
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in lower]
    loss = guard.attached(closure, guard.entry)
    slopes = torch.autograd.grad(loss, lower, create_graph=True, allow_unused=True)
    pairs = [(s, u) for s, u in zip(slopes, v, strict=True) if s is not None and s.requires_grad]
    if not pairs:
        return 0.0
    outputs, vectors = [s for s, _ in pairs], [u for _, u in pairs]
    product = mean(gradients_of(inputs, inputs, torch.autograd.grad(outputs, inputs, vectors, allow_unused=True)))
    before = [p.detach().clone() for p in lower]
    unit, size = rounding(lower), math.sqrt(dot(before, before))
    step = unit ** (1 / 3) * max(1.0, size) / math.sqrt(dot(v, v))

    def gradient(length: float) -> tuple[Tensor, list[Tensor]]:
        for p, point, u in zip(lower, before, v, strict=True):
            p.data.copy_(point + length * u)  # no new version of the tensor: the user's graphs may hold it
        value, found = guard.gradient(closure, inputs, guard.entry)
        return value, gradients_of(inputs, inputs, found)

    try:
        again, here = gradient(0.0)
        ahead, back = gradient(step)[1], gradient(-step)[1]
    finally:
        for p, point in zip(lower, before, strict=True):
            p.data.copy_(point)
    if on_host((again - loss.detach()).abs())[0] > 64.0 * unit * on_host(again.abs())[0]:
        return 0.0  # the closure changes from call to call
    change = [(a - b) / (2.0 * step) for a, b in zip(ahead, back, strict=True)]
    error = [a - b for a, b in zip(change, product, strict=True)]
    noise = 64.0 * unit / step * math.sqrt(dot(here, here))
    apart = math.sqrt(max(dot(error, error), 0.0)) - noise
    whole = max(math.sqrt(dot(change, change)), math.sqrt(dot(product, product)))
    return apart / whole if whole > 0.0 and math.isfinite(apart / whole) else 0.0
