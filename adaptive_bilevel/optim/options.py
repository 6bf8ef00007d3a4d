"""Options as frozen dataclasses: the conduct that all optimizers share, and the way from records to ``defaults``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from ..errors import OptionError
from ..policies import validation
from ..policies.scalars import Scalar
from .direction import DIRECTIONS, Direction

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "CALLABLE",
    "Conduct",
    "is_plain",
    "is_role",
    "merged",
    "on_numbers",
    "refuse_unused",
    "refuse_unused_moments",
    "replaced",
]

R = TypeVar("R", bound="DataclassInstance")

CALLABLE = "callable"
"""What ``defaults`` and saved states hold in the place of a function or an object."""


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How an optimizer behaves, whatever its rule.

    Args:
        owner: Name of the optimizer's class, for messages; no option.
        direction: "sgd", "adam", or a `Direction`.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: One is out of range.
    """

    owner: str = field(repr=False, compare=False, metadata={"option": False})
    direction: str | Direction = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_skips: int = 100

    def __post_init__(self) -> None:
        if not is_role(self.direction):
            listed = ", ".join(map(repr, DIRECTIONS))
            if not (isinstance(self.direction, str) and self.direction in DIRECTIONS):
                raise OptionError(
                    f"{self.owner}(direction={self.direction!r}): direction must be one of {listed} or a Direction"
                )
        if not (isinstance(self.betas, (tuple, list)) and len(self.betas) == 2 and all(map(_is_decay, self.betas))):
            raise OptionError(f"{self.owner}(betas={self.betas!r}): betas must be two numbers in [0, 1)")
        validation.non_negative(self.owner, "eps", self.eps)
        validation.count(self.owner, "max_skips", self.max_skips)
        validation.make_plain(self)


def is_role(value: object) -> bool:
    """Return whether a value is an object in the place of a name, such as a `Direction`."""
    return not isinstance(value, type) and callable(getattr(value, "propose", None))


def is_plain(value: object) -> bool:
    """Return whether ``defaults`` and saved states can hold the value: no function and no object."""
    return not (callable(value) or is_role(value))


def refuse_unused(owner: str, record: DataclassInstance, names: Iterable[str], reason: str) -> None:
    """Reject options that nothing reads, where they are not at their defaults.

    Args:
        owner: Name of the optimizer's class.
        record: The dataclass that has them.
        names: Which of its fields nothing reads.
        reason: When that is so, and the remedy: what follows "betas is not used ".

    Raises:
        OptionError: One of them is not at its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(record)}
    for name in names:
        value = getattr(record, name)
        if value != defaults[name]:
            raise OptionError(f"{owner}({name}={value!r}): {name} is not used {reason}")


def refuse_unused_moments(owner: str, conduct: Conduct, names: Iterable[str] = ("betas", "eps")) -> None:
    """Reject Adam's constants under a direction that has no moments of this package.

    Raises:
        OptionError: One of them is not at its default.
    """
    direction = conduct.direction
    if direction == "adam":
        return
    remedy = ", or give direction='adam'" if direction == "sgd" else "; such a direction has constants of its own"
    refuse_unused(owner, conduct, names, f"with direction={direction!r}: leave it out{remedy}")


# ------------------------------------------------------------------------------------------ records and defaults


def merged(records: Iterable[DataclassInstance], absent: Iterable[str] = ()) -> dict[str, object]:
    """Return all options of some records by name; a name that several records have belongs to the last of them.

    Args:
        records: Frozen dataclasses. A field whose metadata has ``option=False`` is none.
        absent: Names of fields that are no options either.
    """
    return {
        f.name: validation.plain(getattr(record, f.name))
        for record in records
        for f in dataclasses.fields(record)
        if f.name not in absent and f.metadata.get("option", True)
    }


def replaced(records: Mapping[str, DataclassInstance], values: Mapping[str, object]) -> dict[str, DataclassInstance]:
    """Return the records with other values of their options, validated: the inverse of `merged`.

    Args:
        records: The records.
        values: New values by the names of options; those without one keep theirs.
    """
    owners = {name: key for key, record in records.items() for name in merged([record])}
    changes = {key: {name: v for name, v in values.items() if owners.get(name) == key} for key in records}
    return {key: dataclasses.replace(record, **changes[key]) for key, record in records.items()}


def on_numbers(owner: str, record: R) -> R:
    """Return the record with its functions returning Python's numbers (or tensors): state made of them stays plain."""
    functions = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return dataclasses.replace(
        record, **{name: _Numbers(owner, name, value) for name, value in functions.items() if callable(value)}
    )


class _Numbers:
    """A schedule of the user's, with values that are Python's numbers (or tensors)."""

    def __init__(self, owner: str, name: str, function: Callable[[Scalar], Scalar]) -> None:
        self._owner, self._name, self._function = owner, name, function

    def __call__(self, k: Scalar) -> Scalar:
        value = self._function(k)
        try:
            return value if isinstance(value, Tensor) else float(value)
        except (TypeError, ValueError):
            raise OptionError(
                f"{self._owner}({self._name}={self._function!r}): it returned {value!r} for k={k}; it must return a "
                "number"
            ) from None


def _is_decay(beta: object) -> bool:
    return isinstance(beta, Real) and 0.0 <= float(beta) < 1.0
