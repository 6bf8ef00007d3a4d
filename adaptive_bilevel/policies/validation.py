"""Validation of options (every message names the option, its value and the remedy), and their plain form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

from ..errors import OptionError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["at_least_one", "choice", "count", "finite", "fraction", "make_plain", "non_negative", "plain", "positive"]


def _require(valid: bool, owner: str, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise OptionError(f"{owner}({name}={value!r}): {remedy}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(float(value))


def positive(owner: str, name: str, value: object, *, optional: bool = False, below_infinity: bool = False) -> None:
    """Require a number above 0 (infinity included, unless `below_infinity`)."""
    valid = (optional and value is None) or (_is_number(value) and 0 < value)
    valid = valid and not (below_infinity and value == math.inf)
    kind = "a finite number" if below_infinity else "a number"
    _require(valid, owner, name, value, f"{name} must be {kind} above 0" + (", or None" if optional else ""))


def non_negative(owner: str, name: str, value: object) -> None:
    """Require a finite number at or above 0."""
    valid = _is_number(value) and 0 <= value < math.inf
    _require(valid, owner, name, value, f"{name} must be a finite number at or above 0")


def at_least_one(owner: str, name: str, value: object) -> None:
    """Require a finite number at or above 1."""
    valid = _is_number(value) and 1 <= value < math.inf
    _require(valid, owner, name, value, f"{name} must be a finite number, at least 1")


def finite(owner: str, name: str, value: object, *, optional: bool = False) -> None:
    """Require a finite number."""
    valid = (optional and value is None) or (_is_number(value) and math.isfinite(value))
    _require(valid, owner, name, value, f"{name} must be a finite number" + (", or None" if optional else ""))


def fraction(owner: str, name: str, value: object) -> None:
    """Require a number strictly between 0 and 1."""
    _require(_is_number(value) and 0 < value < 1, owner, name, value, f"{name} must lie strictly between 0 and 1")


def count(owner: str, name: str, value: object, *, least: int = 1) -> None:
    """Require a whole number at or above `least`."""
    valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    _require(valid, owner, name, value, f"{name} must be a whole number, at least {least}")


def choice(owner: str, name: str, value: object, choices: Iterable[str], *, or_callable: bool = False) -> None:
    """Require one of some words (or, if allowed, a callable)."""
    words = tuple(choices)
    if or_callable and callable(value):
        return
    listed = ", ".join(repr(word) for word in words) + (" or a callable" if or_callable else "")
    _require(isinstance(value, str) and value in words, owner, name, value, f"{name} must be one of {listed}")


def plain(value: Any) -> Any:
    """Return NumPy's numbers (and the like), also those inside a list or tuple, as Python's, and all else as it is.

    Options of another kind would make all that is computed with them of that kind, and checkpoints unreadable for
    ``torch.load(..., weights_only=True)``.
    """
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(plain(part) for part in value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def make_plain(options: DataclassInstance) -> None:
    """Set a frozen dataclass's options to their plain form."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))
