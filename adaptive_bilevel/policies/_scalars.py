"""Arithmetic on scalars of any kind: Python and NumPy numbers, 0-dim arrays and tensors, traced values.

The rules are written once, with operators and the two functions that operators cannot express (`where`,
`isfinite`). On numbers these are plain Python; on arrays they come from the array namespace (`array_api_compat`,
which imports no framework by itself). What this costs per step is printed by
``python examples/benchmarks/policy_cost.py``.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Scalar", "isfinite", "larger", "resolution", "smaller", "where"]

Scalar = Any
"""A number, or a 0-dim array or tensor of NumPy, PyTorch or JAX (traced or not)."""


def _namespace(array: Any) -> Any:
    import array_api_compat

    return array_api_compat.array_namespace(array)


def where(condition: Any, left: Scalar, right: Scalar) -> Scalar:
    """Return `left` where the condition holds and `right` elsewhere, without branching on an array."""
    if isinstance(condition, bool):
        return left if condition else right
    return _namespace(condition).where(condition, left, right)


def isfinite(scalar: Scalar) -> Any:
    """Return whether the scalar is neither infinite nor NaN."""
    return math.isfinite(scalar) if isinstance(scalar, (int, float)) else _namespace(scalar).isfinite(scalar)


def smaller(left: Scalar, right: Scalar) -> Scalar:
    """Return the smaller of two scalars, neither of them NaN (`min` of Python mishandles NaN in either order)."""
    return where(left < right, left, right)


def larger(left: Scalar, right: Scalar) -> Scalar:
    """Return the larger of two scalars, neither of them NaN."""
    return where(left > right, left, right)


def resolution(scalar: Scalar) -> float:
    """Return the relative rounding unit of the scalar's own dtype.

    >>> resolution(1.0)
    2.220446049250313e-16
    """
    if isinstance(scalar, (int, float)):
        return 2.220446049250313e-16
    return float(_namespace(scalar).finfo(scalar.dtype).eps)
