"""How long a lower loop lasts whose steps are not counted: from what it does to y.

An upper step moves x by -a d, and the next loop moves y to y'. By the linear model of the lower gradient, gradient
descent of duration s does so by

    y' - y = phi_s(H) (a C^T d - grad_y g)               if the loop begins at y
    y' - y = phi_s(H) a C^T d                            if it begins at the same point each time
    y' - y = p + phi_s(H) (a C^T d - grad_y g - H p)     if it begins at y + p, the prediction of the upper step
    phi_s(t) = (1 - exp(-s |t|)) / |t|

with grad_y g at (x, y), what the loop before has left. Along w = P C^T d, which the upper step has computed, both sides
are numbers, and H is known by its Ritz values. s is the duration for which one of the three agrees best over the last
loops; of durations that agree alike, the longest. p is taken for a multiple of w.

Steps of another metric (Adam's) count by what they do to y.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..evaluation.reductions import on_host
from ..evaluation.vectors import inner

__all__ = ["Course", "ObservedLoop"]

_LONGER, _SHORTER = 6, 21
"""The durations tried: powers of 2 from 2^6 to 2^-21 times k^2 / max |t|. More or less makes no difference."""

_DECAY = 0.9
"""Decay of the mean over loops."""

_ALIKE = 0.01
"""Mean squared relative differences that differ by less do not tell durations apart. A factor of 2 makes .11."""


class Course(NamedTuple):
    """Where a loop would move y along w, as a function of its duration.

    Attributes:
        along: w.
        place: <w, y>.
        answers: <w, phi_s C^T d>, for each duration s.
        rests: <w, phi_s grad_y g>, likewise.
        repeated: <w, phi_s H w> / <w, w>, likewise.
    """

    along: Sequence[Tensor]
    place: float
    answers: Tensor
    rests: Tensor
    repeated: Tensor


class _Expected(NamedTuple):
    """A step: its course, its length a, and <w, p>."""

    course: Course
    step: float
    predicted: float


@final
class ObservedLoop:
    """The duration of a lower loop, estimated.

    Attributes:
        limit: Infinite: at which curvatures the loop diverges is not known.
    """

    limit: float = math.inf

    def __init__(self) -> None:
        self._durations: Tensor | None = None
        self._errors: Tensor | float = 0.0
        self._weight = 0.0
        self._expected: _Expected | None = None
        self._found = math.inf

    def saved(self) -> dict[str, Any]:
        """Return what is known as numbers and tensors; {} before the first step."""
        if self._durations is None:
            return {}
        known = {"durations": self._durations, "errors": self._errors, "weight": self._weight, "found": self._found}
        if self._expected is None:
            return known
        course, step, predicted = self._expected
        return {**known, "course": course._asdict(), "step": step, "predicted": predicted}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put what `saved` returned in the place of what is known."""
        self._durations, self._errors = saved.get("durations"), saved.get("errors", 0.0)
        self._weight, self._found, self._expected = saved.get("weight", 0.0), saved.get("found", math.inf), None
        if "course" in saved:
            self._expected = _Expected(Course(**saved["course"]), saved["step"], saved["predicted"])

    def durations(self, resolved: float) -> Tensor:
        """Return the durations that are tried, longest first.

        Args:
            resolved: k^2 / max |t|. The first call decides.
        """
        if self._durations is None:
            powers = torch.arange(_LONGER, -_SHORTER - 1, -1, dtype=torch.float64)
            self._durations = resolved * 2.0**powers
        return self._durations

    def expect(self, lower: Sequence[Tensor], course: Course | None, step: float = 0.0) -> None:
        """Take note of what an upper step has done, in place of the one before.

        Args:
            lower: y after the step, y + p.
            course: Of the step; None: nothing is known of it.
            step: a.
        """
        self._expected = None
        if course is not None and step > 0.0:
            self._expected = _Expected(course, step, _place(course, lower) - course.place)

    def ask(self, lower: Sequence[Tensor]) -> float:
        """Return the duration of the loop; infinite before one was seen.

        Args:
            lower: y after the loop.
        """
        expected, self._expected = self._expected, None
        if expected is not None and [t.shape for t in expected.course.along] == [t.shape for t in lower]:
            self._see(expected, lower)
        return self._found

    def _see(self, expected: _Expected, lower: Sequence[Tensor]) -> None:
        course, predicted = expected.course, expected.predicted
        moved, answers = _place(course, lower) - course.place, expected.step * course.answers
        warm = answers - course.rests
        models = torch.stack([warm, answers, predicted + warm - predicted * course.repeated])
        sizes = abs(moved) + models.abs()
        if not (math.isfinite(moved) and bool(torch.isfinite(sizes).all()) and bool(sizes.min() > 0.0)):
            return
        self._errors = _DECAY * self._errors + ((moved - models) / sizes).square()
        self._weight = _DECAY * self._weight + 1.0
        assert self._durations is not None
        best = self._errors.min(0).values / self._weight
        self._found = float(self._durations[int((best <= best.min() + _ALIKE).nonzero()[0])])


def _place(course: Course, lower: Sequence[Tensor]) -> float:
    (place,) = on_host(inner(course.along, [t.detach() for t in lower]))
    return place
