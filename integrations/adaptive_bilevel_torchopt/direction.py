"""Directions from TorchOpt: any GradientTransformation as that which a step size multiplies.

A transformation with learning rate 1 turns gradients g into updates u = -d. The step size is searched, or computed by
Polyak's rule, along d with the true slope <g, d>; where that is negative (a momentum after a turn) nothing moves, the
record says `no_descent`, and the transformation's memory goes on, so that a later direction descends again.

TorchOpt scales an update and then adds it, which rounds differently from adding a multiple; so do the steps here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, final

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.optim.direction import DIRECTIONS, Descent, Gradient
from adaptive_bilevel.optim.state import RoleState

from ._host import Memory, Transformation, torchopt
from .trees import either

__all__ = ["DirectionOption", "Plain", "Transformed", "as_direction", "as_stepped"]


def scale_then_add(
    params: Sequence[Tensor], directions: Sequence[Tensor], step: float, factors: Sequence[float]
) -> None:
    """Move the parameters by -step * factor * direction, as `torchopt.apply_updates` adds a scaled update."""
    if all(w == 1.0 for w in factors):
        updates = list(torch._foreach_mul(list(directions), -step))
    else:
        updates = [d.mul(-step * w) for d, w in zip(directions, factors, strict=True)]
    torch._foreach_add_(list(params), updates)


@final
class Plain:
    """The gradient itself, as ``torchopt.sgd(lr=1.0)`` gives it."""

    kind = "sgd"

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return g to search and to step along."""
        return Descent(list, move=scale_then_add)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return nothing new."""
        return RoleState()

    def __repr__(self) -> str:
        return "'sgd'"


@final
class Transformed:
    """The direction of a GradientTransformation.

    Args:
        transformation: E.g. ``torchopt.adam(lr=1.0)``, ``torchopt.rmsprop(lr=1.0)``, or a ``torchopt.chain`` with
            clipping or weight decay. A learning rate other than 1 scales the direction.
        search: The direction to search along, if it is not the one to step along. For Adam as in Fan et al. (2023),
            Algorithm 2, which searches along A^{-1} g and steps along A^{-1} m:
            ``Transformed(torchopt.adam(lr=1.0), torchopt.adam(lr=1.0, betas=(0.0, 0.999)))``.

    Its memory is kept in the state of the optimizer, per parameter that has a gradient; where other parameters have one
    than before, it starts anew.

    Raises:
        OptionError: No GradientTransformation.

    >>> import torch
    >>> from adaptive_bilevel import BiSLS
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> outer = BiSLS([x], direction=Transformed(torchopt.rmsprop(lr=1.0)))
    >>> for _ in range(20):
    ...     x.grad = 2 * x.detach()
    ...     _ = outer.step(lambda: (x**2).sum())
    >>> bool(abs(x) < 0.1)
    True
    """

    kind = "transformation"

    def __init__(self, transformation: Transformation, search: Transformation | None = None) -> None:
        for given in (transformation, search):
            if not (given is None and transformation is not None) and not _is_transformation(given):
                raise OptionError(
                    f"direction={given!r}: pass 'sgd', 'adam' or a GradientTransformation, e.g. torchopt.adam(lr=1.0) "
                    "(a function of torchopt in lower case, not an optimizer class)"
                )
        self.transformation = transformation
        self._parts = [transformation] if search is None else [transformation, search]
        self._structures: dict[int, list[Memory]] = {}

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, gradient: Gradient, state: RoleState) -> Descent:
        """Return the directions at these gradients."""
        params, grads = gradient.tensors, gradient.values
        before = self._before(params, state)
        made = [
            part.update(list(grads), memory, params=list(params), inplace=False)
            for part, memory in zip(self._parts, before, strict=True)
        ]
        stepped = _negated(made[0][0])
        searched = _negated(made[-1][0])

        def precondition(g: Sequence[Tensor]) -> list[Tensor]:
            if len(g) == len(grads) and all(a is b for a, b in zip(g, grads, strict=True)):
                return searched
            updates, _ = self._parts[-1].update(list(g), before[-1], params=list(params), inplace=False)
            return _negated(updates)

        after = [torchopt.pytree.tree_leaves(memory) for _, memory in made]
        old = [torchopt.pytree.tree_leaves(memory) for memory in before]
        return Descent(precondition, stepped, (after, old), scale_then_add)

    def commit(self, gradient: Gradient, descent: Descent, state: RoleState, moved: Tensor | bool = True) -> RoleState:
        """Return the state with these gradients in the memories of the transformations."""
        after, old = descent.memory
        if isinstance(moved, Tensor):
            after = [[either(moved, n, o) for n, o in zip(*pair, strict=True)] for pair in zip(after, old, strict=True)]
        return RoleState({"shapes": [tuple(p.shape) for p in gradient.tensors], "memory": after})

    def _before(self, parameters: Sequence[Tensor], state: RoleState) -> list[Memory]:
        """Return the memory of each part."""
        saved = state.shared
        known = "shapes" in saved and [tuple(s) for s in saved["shapes"]] == [tuple(p.shape) for p in parameters]
        if not known or len(parameters) not in self._structures:
            fresh = [part.init(list(parameters)) for part in self._parts]
            self._structures[len(parameters)] = [torchopt.pytree.tree_structure(memory) for memory in fresh]
            if not known:
                return fresh
        structures = self._structures[len(parameters)]
        return [
            torchopt.pytree.tree_unflatten(structure, leaves)
            for structure, leaves in zip(structures, saved["memory"], strict=True)
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._parts))})"


DirectionOption: TypeAlias = "str | Transformation | Plain | Transformed"
"""What a level takes as its direction: "sgd", "adam", a transformation with learning rate 1, or a `Transformed`."""


def as_direction(direction: DirectionOption) -> str | Plain | Transformed:
    """Return what an optimizer of the core takes as its direction."""
    if isinstance(direction, str):
        if direction == "sgd":
            return Plain()
        if direction in DIRECTIONS:
            return direction
    return direction if isinstance(direction, (Plain, Transformed)) else Transformed(direction)  # type: ignore[arg-type]


def as_stepped(
    direction: DirectionOption, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Plain | Transformed:
    """Return the direction for a constant step, which is TorchOpt's own to the bit, whether it descends or not.

    The slope in its record is that of the plain gradient.

    Args:
        direction: As for `as_direction`; "adam" is TorchOpt's.
        betas: Its decay constants.
        eps: Its eps.
    """
    along = as_direction(direction)
    if isinstance(along, str):
        along = Transformed(torchopt.adam(lr=1.0, betas=betas, eps=eps))
    return along if isinstance(along, Plain) else Transformed(along.transformation, torchopt.sgd(lr=1.0))


def _is_transformation(given: object) -> bool:
    return isinstance(given, torchopt.base.GradientTransformation)


def _negated(updates: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_neg(list(updates)))
