"""A lower level of functional code: tensors that an inner loop returns anew each time, and losses that take them.

An upper step is given ``lower=(tensors, loss)``. The tensors may be a tensor, or lists, tuples and mappings of tensors,
with or without a graph, with or without requires_grad. They are only read, except where both levels go back to an
earlier point (see ``retreat``): the step works on leaves of its own, and hands these to both losses, arranged as the
tensors were. A list of such pairs is a lower level of several problems (the
tasks of a meta-batch); the upper loss then takes the list of their variables.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ..errors import ClosureError, LowerLevelError, OptionError, TensorError
from ..evaluation import foreach
from ..evaluation.closures import Closure
from ..evaluation.graph import nodes
from ..evaluation.guard import Guard
from ..evaluation.parts import require_whole
from ..evaluation.tensors import refuse_unsupported
from ..hypergradient.trees import Tree, flatten, rebuilt
from .lower import LowerProblem

__all__ = ["FunctionalLower", "FunctionalProblem", "UpperLoss"]

Loss: TypeAlias = Callable[[Tree], Any]

UpperLoss: TypeAlias = Callable[..., Any]
"""The upper loss of a step: a closure, or, with ``lower=(tensors, loss)``, a function of the lower variable."""

_LINES = (
    "write\n"
    "    outer.step(lambda y: upper_loss(x, y), lower=(y, lambda y: lower_loss(x, y)))\n"
    "    y = outer.answer  # only for a warm start"
)

_OF_MODULES = (
    "the step works on copies, which are parameters of no fully_shard module. Give the optimizer of the module's "
    "parameters: BiSLS(x, lower=inner)"
)

_HIDES = "CheckpointFunctionBackward"
"""A reentrant checkpoint hides which tensors are in its part of a graph."""


@final
class PathCheck:
    """Looks once whether a loss is computed from the leaves.

    Args:
        name: Which loss it is.
        leaves: The leaves.
    """

    def __init__(self, name: str, leaves: Sequence[Tensor]) -> None:
        self._name, self._leaves, self._found = name, leaves, False

    def of(self, loss: Any) -> Any:
        """Return the loss.

        Raises:
            LowerLevelError: It has a graph, and no leaf is in it.
        """
        if self._found or not (isinstance(loss, Tensor) and loss.requires_grad):
            return loss
        wanted = {id(p) for p in self._leaves}
        self._found = id(loss) in wanted or any(
            id(getattr(node, "variable", None)) in wanted or node.name() == _HIDES for node in nodes([loss.grad_fn])
        )
        if self._found:
            return loss
        raise LowerLevelError(
            f"{self._name} has no path to the tensors of lower=: it has to be computed from its argument, and not "
            f"from the variable of the inner loop itself: {_LINES}"
        )


@final
class FunctionalProblem:
    """One lower problem: its variable, as leaves of our own, and the loss that takes it.

    Args:
        tensors: The variable as the inner loop returned it.
        loss: ``loss(tensors)``.
        step_size: The last step of the inner loop, which only the paper's search reads; NaN: not known.
    """

    def __init__(self, tensors: Tree, loss: Loss, step_size: float = math.nan) -> None:
        self.given, self._structure = flatten(tensors, "lower")
        require_whole("step(lower=(tensors, loss))", self.given, _OF_MODULES)
        for t in self.given:
            refuse_unsupported("step(lower=(tensors, loss))", t, "tensor")
        self.form = _form(self._structure)
        with torch.no_grad():
            self.leaves = [t.detach().clone().requires_grad_() for t in self.given]
        self._loss: Loss | None = loss
        self.step_size = step_size
        self._path = PathCheck("the lower loss", self.leaves)

    def arranged(self) -> Tree:
        """Return the leaves as the tensors were arranged."""
        return rebuilt(self._structure, self.leaves)

    def closure(self) -> Any:
        """Return the loss at the leaves."""
        assert self._loss is not None
        return self._path.of(self._loss(self.arranged()))

    def close(self) -> None:
        """Drop the loss and the given tensors. The leaves then require gradients where these did."""
        for leaf, given in zip(self.leaves, self.given, strict=True):
            leaf.requires_grad_(given.requires_grad)
        self._loss, self.given = None, ()
        self._structure = rebuilt(self._structure, self.leaves)


@final
class FunctionalLower:
    """The lower level of one upper step, see the module.

    Args:
        problems: One problem, or several.
        several: Whether a list of them was given.
    """

    follows = True

    def __init__(self, problems: Sequence[FunctionalProblem], several: bool) -> None:
        self._problems, self._several = list(problems), several
        self.open = True

    @classmethod
    def of(cls, owner: str, lower: Any) -> FunctionalLower:
        """Return the level that a step was given.

        Raises:
            OptionError: It is no pair of tensors and a loss, and no list of pairs.
            TensorError: A tensor is of a kind that cannot be stepped.
        """
        if isinstance(lower, torch.optim.Optimizer):
            raise OptionError(
                f"{owner}.step(lower={type(lower).__name__}): an optimizer is given once, as {owner}(..., lower=inner) "
                "or bind(inner); lower= of a step is (tensors, loss)"
            )
        pairs = [lower] if _is_pair(lower) else lower
        if not (isinstance(pairs, (list, tuple)) and pairs and all(map(_is_pair, pairs))):
            raise OptionError(
                f"{owner}.step(lower={_kind(lower)}): lower must be (tensors, loss), where loss(tensors) is the lower "
                f"loss, or a list of such pairs: {_LINES}"
            )
        for _, loss, *_ in pairs:
            _require_argument(owner, "the lower loss", loss)
        return cls([FunctionalProblem(*pair) for pair in pairs], pairs is lower)

    def upper(self, owner: str, loss: UpperLoss) -> Closure:
        """Return the upper loss at the leaves, as a closure."""
        _require_argument(owner, "the upper loss", loss)
        path = PathCheck("the upper loss", self.tensors())
        return lambda: path.of(loss(self.variable()))

    def variable(self) -> Tree:
        """Return the lower variable as the closures take it: as it was given, or the list of those of all problems."""
        found = [problem.arranged() for problem in self._problems]
        return found if self._several else found[0]

    def require_form(self, owner: str, before: object) -> None:
        """Raise if this level is arranged otherwise than the one of the step before."""
        if not isinstance(before, FunctionalLower):
            return
        for old, new in zip(before._problems, self._problems, strict=False):
            if old.form != new.form:
                raise LowerLevelError(
                    f"{owner}.step(lower=...): the lower variable is arranged otherwise than in the last step, "
                    f"{_said(new.form)} and not {_said(old.form)}. Pass the tensors of the inner loop in the same "
                    "places each time. If another problem begins here, write\n"
                    "    outer.bind(None)  # forgets the last lower variable\n"
                    "before this step"
                )

    def refuse_shared(self, upper: Sequence[Tensor]) -> None:
        """Raise if an upper parameter was given as a lower tensor, too."""
        own = {id(t) for problem in self._problems for t in problem.given}
        shapes = [tuple(p.shape) for p in upper if id(p) in own]
        if shapes:
            raise TensorError(
                f"the upper and the lower level share tensors of shapes {shapes}: each tensor belongs to one level; "
                "give lower= the tensors of the inner loop only"
            )

    def close(self) -> None:
        """Drop the losses and the given tensors. The level cannot be evaluated afterwards."""
        self.open = False
        for problem in self._problems:
            problem.close()

    # ------------------------------------------------------------------------------------------ what an upper step sees

    def tensors(self) -> list[Tensor]:
        """Return the leaves of all problems."""
        return [t for problem in self._problems for t in problem.leaves]

    def problems(self, closures: Any, guard: Guard) -> list[LowerProblem]:
        """Return the lower problems."""
        if closures is not None:
            raise ClosureError("step(lower=(tensors, loss), lower_closure=...): two lower losses; give one of the two")
        random = guard.random_state()
        return [LowerProblem(p.leaves, p.closure, random, p.step_size) for p in self._problems]

    def upper_moved(self) -> None:
        """Do nothing: the lower steps are the user's."""

    @property
    def limit(self) -> float | None:
        """None: the lower steps are the user's."""
        return None

    def restart(self) -> None:
        """Write the earlier point to leaves that were given, for loops that go on from these and not from `answer`."""
        for problem in self._problems:
            given = [t for t in problem.given if t.is_leaf]
            leaves = [leaf for leaf, t in zip(problem.leaves, problem.given, strict=True) if t.is_leaf]
            with torch.no_grad():
                foreach.copy_(given, leaves)

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        """Move the leaves by step * response."""
        with torch.no_grad():
            foreach.add_(self.tensors(), response, alpha=step)


def _is_pair(value: Any) -> bool:
    """Return whether a value is (tensors, loss) or (tensors, loss, step_size)."""
    return (
        isinstance(value, (tuple, list))
        and len(value) in (2, 3)
        and callable(value[1])
        and (len(value) == 2 or isinstance(value[2], (int, float)))
    )


def _require_argument(owner: str, name: str, loss: Any) -> None:
    """Raise where a loss does not take the lower variable."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return  # a callable without a signature
    try:
        signature.bind(None)
    except TypeError:
        raise ClosureError(
            f"{owner}.step(lower=(tensors, loss)): {name} cannot be called with the lower variable as its one "
            f"argument ({getattr(loss, '__name__', type(loss).__name__)}{signature}): {_LINES}"
        ) from None


def _form(tree: Tree, path: str = "y") -> tuple[tuple[str, tuple[int, ...], torch.dtype, torch.device], ...]:
    """Return where in a structure which tensors are."""
    if isinstance(tree, Tensor):
        return ((path, tuple(tree.shape), tree.dtype, tree.device),)
    named = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return tuple(entry for key, child in named for entry in _form(child, f"{path}[{key!r}]"))


def _said(form: Sequence[tuple[str, tuple[int, ...], torch.dtype, torch.device]]) -> str:
    listed = [f"{path}: {shape}" for path, shape, _, _ in form[:4]]
    return "{" + ", ".join(listed) + (", ..." if len(form) > 4 else "") + "}"


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value[:3])}"
    return type(value).__name__
