"""Every error and warning of the package.

Each error is an `AdaptiveBilevelError` and also the builtin error that a reader would expect, so that
``except ValueError`` keeps working. Messages name the argument, its value and the remedy. Whatever raised,
parameters, buffers, random state and policy state are exactly as they were before the call.
"""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "AdaptiveBilevelError",
    "AdaptiveBilevelWarning",
    "ClosureError",
    "DependencyError",
    "HypergradientError",
    "LowerLevelError",
    "NonFiniteError",
    "OptionError",
    "ProcessError",
    "SolverError",
    "TensorError",
    "pass_over",
    "warn",
]


class AdaptiveBilevelError(Exception):
    """Base of all errors of this package."""


class OptionError(AdaptiveBilevelError, ValueError):
    """An option has a value outside its range."""


class ClosureError(AdaptiveBilevelError, TypeError):
    """A closure is missing, or what it returned is no attached scalar loss."""


class TensorError(AdaptiveBilevelError, TypeError):
    """A tensor is of a kind that cannot be stepped (sparse, complex, shared between the levels)."""


class HypergradientError(AdaptiveBilevelError, RuntimeError):
    """The hypergradient is absent or does not fit the upper parameters."""


class LowerLevelError(AdaptiveBilevelError, RuntimeError):
    """The lower level is missing, or has not taken a step yet."""


class SolverError(AdaptiveBilevelError, RuntimeError):
    """A linear solver cannot be used on this problem."""


class NonFiniteError(AdaptiveBilevelError, RuntimeError):
    """Too many steps in a row met a loss or a gradient that is not finite."""


class DependencyError(AdaptiveBilevelError, ImportError):
    """An optional package is missing."""


class ProcessError(AdaptiveBilevelError, RuntimeError):
    """Another process has failed, or processes that step together have different parameters."""


class AdaptiveBilevelWarning(UserWarning):
    """Something that training survives, but that its owner should know."""


_PASSED_OVER = {"adaptive_bilevel", "torch"}


def pass_over(*packages: str) -> None:
    """Have no warning point into these packages: an integration names its own and its host's."""
    _PASSED_OVER.update(packages)


def warn(message: str) -> None:
    """Warn, and point to the line of the user's that led here: the innermost one outside of the packages passed over.

    However deep the caller is, and whatever a scheduler, a hook or a host has wrapped around it.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, AdaptiveBilevelWarning, stacklevel=level)
