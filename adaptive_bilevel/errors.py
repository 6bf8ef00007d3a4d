"""All errors and warnings of the package.

Each error is an `AdaptiveBilevelError` and also a builtin error, so that ``except ValueError`` works. Messages name the
argument, its value and the remedy. After an error, parameters, buffers, random state and policy state are exactly as
before the call.
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
    """A closure is missing, or does not return a scalar loss that requires a gradient."""


class TensorError(AdaptiveBilevelError, TypeError):
    """A tensor is of an unsupported kind (sparse, complex, shared between the levels)."""


class HypergradientError(AdaptiveBilevelError, RuntimeError):
    """The hypergradient is absent or does not fit the upper parameters."""


class LowerLevelError(AdaptiveBilevelError, RuntimeError):
    """The lower level is missing, or has not taken a step yet."""


class SolverError(AdaptiveBilevelError, RuntimeError):
    """A linear solver cannot be used on this problem."""


class NonFiniteError(AdaptiveBilevelError, RuntimeError):
    """The loss or a gradient was not finite in too many steps in a row."""


class DependencyError(AdaptiveBilevelError, ImportError):
    """An optional package is missing."""


class ProcessError(AdaptiveBilevelError, RuntimeError):
    """Another process has failed, or processes that step together have different parameters."""


class AdaptiveBilevelWarning(UserWarning):
    """Training goes on, but the user should know the cause."""


_PASSED_OVER = {"adaptive_bilevel", "torch"}


def pass_over(*packages: str) -> None:
    """Let no warning point into these packages. An integration names its own package and its host's.

    Args:
        packages: Top-level names.

    >>> pass_over("my_integration", "its_host")
    """
    _PASSED_OVER.update(packages)


def warn(message: str) -> None:
    """Warn, and point to the user's line: the innermost one outside of the packages of `pass_over`.

    It is found at any depth of calls, also inside schedulers, hooks and hosts.

    Args:
        message: What happened, and the remedy.

    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     warn("the step was 0")
    >>> str(said[0].message)
    'the step was 0'
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, AdaptiveBilevelWarning, stacklevel=level)
