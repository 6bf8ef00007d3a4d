"""How long a central difference is to be, from the gradients that it consists of.

Over a move of length e, the odd part ``||G(e) - G(-e)||`` is 2 e h, where h is the size of the product. The even part
``||G(e) + G(-e) - 2 G||`` is ``((k e^2)^2 + R^2)^(1/2)``: k e^2 since the derivative changes on the way, R by rounding.
The relative error of the difference is some

    error(e) = (k e / (2 h))^2 + R / (2 sqrt(3) h e)

since the rounding of two gradients is R / sqrt(3) where that of the even part is R. It is least at
``e^3 = R h / (sqrt(3) k^2)``.

R is at least the rounding unit times the gradient, and much more where the gradient is a sum of terms that cancel. A
second length tells it from k e^2. R also differs between the gradients by x and by y, as h and k do, so lengths are
known for each kind of product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Known", "Measured", "Trials", "known_lengths", "restore_lengths", "saved_lengths"]

_SLACK = 2.5
"""A length is tried again where ``_SLACK^2`` times less error is expected: as if it were too long by ``_SLACK``."""
_MOST_USES = 20

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the first tensor of y that moves: a `Known` for each kind of product."""


class Known(NamedTuple):
    """What is known of the differences of one kind.

    Attributes:
        length: e of the next one.
        rounding: R.
        error: Relative change of a product over half of the length; NaN before the first was measured.
        uses: Number of products since.
        checked: The shortest length at which R has been told from k e^2 since.
    """

    length: float
    rounding: float = 0.0
    error: float = math.nan
    uses: int = 0
    checked: float = math.inf


def known_lengths(lower: Tensor) -> dict[str, Known]:
    """Return what is known by kinds of products, to be written to.

    Args:
        lower: The first tensor of y that moves.
    """
    if lower not in _known:
        _known[lower] = {}
    found: dict[str, Known] = _known[lower]
    return found


def saved_lengths(lower: Sequence[Tensor]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return `known_lengths` of tensors as plain numbers, by their places; {} if no difference was taken."""
    found = {str(i): _known[p] for i, p in enumerate(lower) if p in _known}
    return {i: {kind: known._asdict() for kind, known in sorted(kinds.items())} for i, kinds in found.items() if kinds}


def restore_lengths(lower: Sequence[Tensor], saved: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Put what `saved_lengths` returned in the place of what is known."""
    for i, p in enumerate(lower):
        _known.pop(p, None)
        if kinds := saved.get(str(i)):
            _known[p] = {kind: Known(**known) for kind, known in kinds.items()}


class Measured(NamedTuple):
    """One difference.

    Attributes:
        length: e.
        odd: ``||G(e) - G(-e)||``.
        even: ``||G(e) + G(-e) - 2 G||``.
        least: A lower bound of R: the rounding unit times the largest of ``||G||`` and the odd part.
    """

    length: float
    odd: float
    even: float
    least: float

    def bend(self, rounding: float) -> float:
        """Return k e^2."""
        return math.sqrt(max(self.even**2 - rounding**2, 0.0))

    def error(self, rounding: float, length: float | None = None) -> float:
        """Return the relative error, at another length if one is given; inf for a difference of zero."""
        if self.odd == 0.0:
            return math.inf
        share = 1.0 if length is None else length / self.length
        return (share * self.bend(rounding) / self.odd) ** 2 + rounding / (math.sqrt(3.0) * self.odd * share)

    def best(self, rounding: float, target: float) -> float:
        """Return the best length. Where all is rounding, it goes halfway (in logarithms) to an error of ``target``."""
        bend = self.bend(rounding)
        if self.odd == 0.0:
            return 2.0 * self.length
        if bend == 0.0:
            return self.length * math.sqrt(max(min(self.error(rounding), 1.0) / target, 1.0))
        return float(self.length * (rounding * self.odd / (math.sqrt(12.0) * bend**2)) ** (1.0 / 3.0))

    def rounding(self, other: Measured, before: float) -> float:
        """Return R as two lengths show it: even parts that fall more slowly than the length are rounding."""
        longer, shorter = (self, other) if self.length >= other.length else (other, self)
        if shorter.even * longer.length >= longer.even * shorter.length:
            return max(math.sqrt(shorter.even * longer.even), self.least)
        return max(min(before, shorter.even), self.least)


class Trials:
    """The lengths tried for one product.

    Args:
        known: What is known of its kind.
        target: eps^(1/3): where R is eps times the change of G, the best k e / h.
        size: Norm of what is moved. Its own rounding asks for a length of at least ``target^2 * (1 + size)``. The
            length is at most ``target * (1 + size)``, unless eps alone makes R so large that this is too short.

    Attributes:
        best: The best of the differences.
        length: The next length: of another trial, or of the next product.
        ended: Whether no other length is to be tried.
    """

    best: Measured

    def __init__(self, known: Known | None, target: float, size: float) -> None:
        self._target, self._size = target, size
        self._known = Known(target * (1.0 + size)) if known is None else known
        self._rounding, self._checked = self._known.rounding, self._known.checked
        self.length = self._known.length
        self.ended = False
        self._tried = 0

    def add(self, new: Measured) -> bool:
        """Take a difference over ``length``, and return whether it is the best one so far."""
        if not math.isfinite(new.odd + new.even):
            self.ended = True
            if self._tried == 0:
                self.best = new
            return self._tried == 0
        self._learn(new)
        better = self._tried == 0 or new.error(self._rounding) < self.best.error(self._rounding)
        self._tried += 1
        self.best = best = new if better else self.best
        most = self._target * (1.0 + self._size)
        if best.odd > 0.0:
            most = max(most, min(best.length * best.least / (best.odd * self._target), 1.0 + self._size))
        least = self._target**2 * (1.0 + self._size)
        self.length = min(max(best.best(self._rounding, self._target), least), most)
        self.ended = not better or best.odd == 0.0 or self._passes()
        return better

    @property
    def error(self) -> float:
        """The relative error of the best one; 0 where that is zero."""
        return 0.0 if self.best.odd == 0.0 else self.best.error(self._rounding)

    @property
    def due(self) -> float | None:
        """The length to measure the error at, if that is due."""
        known, now = self._known, self.best.length
        due = known.uses + 1 >= _MOST_USES or math.isnan(known.error) or now < self._checked / _SLACK
        return 0.5 * now if due and math.isfinite(self.best.odd + self.best.even) else None

    def known(self, checked: Measured | None = None, error: float = math.nan) -> Known:
        """Return what is known now.

        Args:
            checked: The difference over the length that was due.
            error: The change from it to the best one.
        """
        if checked is None:
            known = self._known._replace(uses=self._known.uses + 1, checked=self._checked)
        else:
            self._rounding = checked.rounding(self.best, self._rounding)
            known = Known(0.0, error=error, checked=checked.length)
        return known._replace(length=self.length, rounding=self._rounding)

    def _learn(self, new: Measured) -> None:
        rounding = max(self._rounding, new.least)
        if self._tried > 0:
            rounding = new.rounding(self.best, rounding)
            self._checked = min(self._checked, new.length, self.best.length)
        elif new.even < rounding:
            rounding = max(math.sqrt(new.even * rounding), new.least)
        self._rounding = rounding

    def _passes(self) -> bool:
        error = self.best.error(self._rounding)
        expected = self.best.error(self._rounding, self.length)
        return error <= max((_SLACK * self._target) ** 2, _SLACK**2 * expected)
