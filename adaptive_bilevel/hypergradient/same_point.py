"""What a hypergradient has computed at a point, for the upper step that begins there.

Both differentiate f and g at one (x, y), in two calls of the user's. The step takes over f_x and f_y, and the graph of
grad_y g, if these are those of its own losses:

* the tensors are the same ones, and neither they nor the derivatives were written to since;
* the loss has the very value that it had then: another batch, or another dropout mask, has another one;
* the last derivatives that the step evaluated itself were those of the hypergradient, bit by bit. So a first step
  evaluates them, and a loss that draws a new sample in each call is never evaluated once more than before. Nor is one
  whose value without a graph has another rounding, but for the first time.

A value of f then takes the place of its gradient. That of g is evaluated only if a candidate fails the model check,
which compares grad_y g there with grad_y g here: on another sample it is another one. If the value is another one, too,
the step begins again, with derivatives of its own. A candidate that passes shows by itself that the tangent holds.

Otherwise the step evaluates the gradients, as it does without a hypergradient of this package. With several processes,
and with losses of half precision, it always does.

The optimizer owns what is left, and drops it when its step ends: a graph holds the tensors that it is looked up by.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..evaluation import processes
from ..evaluation.parts import any_in_parts
from ..evaluation.vectors import Vector
from .curvature import LowerCurvature
from .lanczos import Lanczos
from .products import Curvature
from .solution import LinearSolver, Solution, SolverStatus

__all__ = ["Handover", "following", "handover"]

_expected: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""References to what expects a hypergradient, by the first of its lower tensors."""

Marks = list[tuple[int, bool]]


def _marks(tensors: Sequence[Tensor]) -> Marks:
    """Return what shows that tensors were written to, frozen or unfrozen."""
    return [(t._version, t.requires_grad) for t in tensors]


class _UpperPart(NamedTuple):
    """f with its derivatives.

    Attributes:
        loss: f(x, y), detached.
        tensors: x and y.
        gradients: f_x and f_y.
        marks: Those of `tensors` and `gradients`.
    """

    loss: Tensor
    tensors: Vector
    gradients: Vector
    marks: Marks

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the gradients by some tensors; None: they are not known, or something was written to."""
        known = {id(t): g for t, g in zip(self.tensors, self.gradients, strict=True)}
        if self.marks != _marks((*self.tensors, *self.gradients)) or any(id(t) not in known for t in tensors):
            return None
        return [known[id(t)] for t in tensors]


class _LowerPart(NamedTuple):
    """g with the graph of its gradient.

    Attributes:
        loss: g(x, y), detached.
        gradient: grad_y g, detached.
        upper: The tensors of x.
        lower: The tensors of y.
        marks: Those of x and y before g was evaluated, and of the gradient.
        curvature: Products by autograd, those with C^T without a further gradient; None: the graph is not kept.
    """

    loss: Tensor
    gradient: Vector
    upper: Vector
    lower: Vector
    marks: Marks
    curvature: LowerCurvature | None

    def fits(self, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> bool:
        """Return whether g was differentiated for these tensors, and nothing was written to."""
        same = _same_objects((*self.upper, *self.lower), (*upper, *lower)) and len(self.upper) == len(upper)
        return same and self.marks == _marks((*upper, *lower, *self.gradient))


class _Trust(Enum):
    """Whether derivatives of a level may be taken over.

    They may once they were `agreed` upon. A value that then is another one is `missed`: if the derivatives are the same
    all the same, without a graph the loss has another rounding, and they are `never` taken over.
    """

    unseen = 0
    agreed = 1
    missed = 2
    never = 3

    @property
    def holds(self) -> bool:
        """Whether derivatives may be taken over."""
        return self in (_Trust.agreed, _Trust.missed)

    def compared(self, agrees: bool) -> _Trust:
        """Return what holds after the derivatives were compared."""
        if self is _Trust.never or (self is _Trust.missed and agrees):
            return _Trust.never
        return _Trust.agreed if agrees and processes.count() == 1 else _Trust.unseen


@final
class Handover:
    """What the next step of one optimizer may take over."""

    def __init__(self) -> None:
        self._upper: _UpperPart | None = None
        self._lower: _LowerPart | None = None
        self._trust = {"upper": _Trust.unseen, "lower": _Trust.unseen}

    def expect(self, lower: Sequence[Tensor]) -> None:
        """Take hypergradients for these lower tensors from now on."""
        if lower:
            _expected[lower[0]] = weakref.ref(self)

    def leave(self, upper: _UpperPart, lower: _LowerPart | None) -> None:
        """Leave what a hypergradient has computed, in place of what was left before."""
        self._upper, self._lower = upper, lower

    def release(self) -> None:
        """Drop what was left."""
        self._upper = self._lower = None

    @property
    def has_upper(self) -> bool:
        """Whether f_x and f_y were left that may be taken over."""
        return self._upper is not None and self._trust["upper"].holds

    @property
    def wants_graph(self) -> bool:
        """Whether the graph of grad_y g is to be kept; not beside one of f, for the peak of memory."""
        return all(trust.holds for trust in self._trust.values())

    def compare_upper(self, loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Compare what was left with what a step has evaluated itself, and drop it."""
        left, self._upper = self._upper, None
        if left is not None:
            known = left.of(tensors) if _is_value(left.loss, loss) else None
            agrees = known is not None and _equal(known, gradients)
            self._trust["upper"] = self._trust["upper"].compared(agrees)

    def compare_lower(
        self, loss: Tensor, upper: Sequence[Tensor], lower: Sequence[Tensor], gradient: Sequence[Tensor]
    ) -> None:
        """Likewise for g."""
        left, self._lower = self._lower, None
        if left is not None:
            fits = _is_value(left.loss, loss) and left.fits(upper, lower)
            self._trust["lower"] = self._trust["lower"].compared(fits and _equal(left.gradient, gradient))

    def take_upper(self, value: Tensor | float, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the gradients of f by some tensors if f has this value, and drop them.

        With None, the step evaluates and compares them. The graph of grad_y g is dropped then, too.
        """
        left = self._upper
        if left is None or not self._trust["upper"].holds:
            return None
        known = left.of(tensors) if _is_value(left.loss, value) else None
        if known is None:
            self._trust["upper"] = _Trust.missed
            self._drop_graph()
        else:
            self._upper = None
        return known

    def take_lower(self, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> tuple[Tensor, LowerCurvature] | None:
        """Return g and its products if the tensors are those; whether it is this g is for `confirms_lower`."""
        left = self._lower
        if left is None or left.curvature is None or not self._trust["lower"].holds:
            return None
        self._drop_graph()
        if left.fits(upper, lower):
            return left.loss, left.curvature
        self._trust["lower"] = _Trust.missed
        return None

    def confirms_lower(self, value: Tensor | float, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> bool:
        """Return whether g has the value that was taken over, at (x, y), to which the step has returned."""
        left = self._lower
        if left is None or _is_value(left.loss, value):
            return True
        self._trust["lower"] = _Trust.missed
        self._lower = left._replace(marks=_marks((*upper, *lower, *left.gradient)))
        return False

    def _drop_graph(self) -> None:
        """Keep of g what the next evaluation is compared with."""
        if self._lower is not None:
            self._lower = self._lower._replace(curvature=None)


class _Following:
    """The step after a hypergradient, as far as it is known.

    Args:
        expected: What it takes over from; None: there is none that would take over anything.
        x: The tensors of x.
        y: The tensors of y.
    """

    def __init__(self, expected: Handover | None, x: Vector, y: Vector) -> None:
        self._expected, self._x, self._y = expected, x, y
        self._marks: Marks = []
        if expected is not None:
            expected.release()  # before there is another graph
            self._marks = _marks((*x, *y))

    @property
    def wants_graph(self) -> bool:
        """Whether it will ask for C^T d, with the graph of grad_y g."""
        return self._expected is not None and self._expected.wants_graph

    def leave(self, solution: Solution, upper: tuple[Tensor, Vector, Vector], lower: tuple[Tensor, Curvature]) -> None:
        """Leave what it may take over.

        Args:
            solution: P f_y. Nothing is left where f_y is zero, or something is not finite.
            upper: f, f_x and f_y.
            lower: g, and products. They are kept if they are those of autograd.
        """
        if self._expected is None or solution.status in (SolverStatus.zero_rhs, SolverStatus.non_finite):
            return
        value, direct, through = upper
        above = _UpperPart(
            value, (*self._x, *self._y), (*direct, *through), [*self._marks, *_marks((*direct, *through))]
        )
        loss, curvature = lower
        exact, gradient = curvature.by_autograd(), curvature.gradient
        kept = exact if self.wants_graph else None
        below = _LowerPart(loss, gradient, self._x, self._y, [*self._marks, *_marks(gradient)], kept)
        self._expected.leave(above, None if exact is None else below)


def following(solver: LinearSolver, x: Vector, y: Vector) -> _Following:
    """Return the step that follows a hypergradient.

    Args:
        solver: That of the hypergradient.
        x: The tensors of x.
        y: The tensors of y.
    """
    shared = isinstance(solver, Lanczos) and not any_in_parts((*x, *y))
    return _Following(handover(y) if shared else None, x, y)


def handover(lower: Sequence[Tensor]) -> Handover | None:
    """Return what expects a hypergradient for these lower tensors; None: nothing does."""
    found = _expected.get(lower[0]) if lower and processes.count() == 1 else None
    waiting: Handover | None = None if found is None else found()
    return waiting


def _is_value(known: Tensor, value: Tensor | float) -> bool:
    """Return whether a loss has a known value, and its digits tell samples apart."""
    if isinstance(value, Tensor) and value.dtype != known.dtype:
        return False
    number = float(known)
    return known.dtype in (torch.float32, torch.float64) and math.isfinite(number) and number == float(value) != 0.0


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _same_objects(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
