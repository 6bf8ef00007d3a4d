"""Tensors at the edge: flattening arguments, rejecting what cannot be differentiated, evaluating closures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError, TensorError
from adaptive_bilevel.evaluation.guard import Guard, RandomState, Workspace
from adaptive_bilevel.evaluation.parts import refuse_parts
from adaptive_bilevel.evaluation.processes import Group, checked
from adaptive_bilevel.evaluation.vectors import on_cpu

__all__ = [
    "Closure",
    "Tree",
    "check_callable",
    "check_levels",
    "evaluate",
    "flatten",
    "guarded",
    "rebuilt",
    "same_structure",
]

Closure: TypeAlias = Callable[[], Any]  # returns the loss; like in the optimizers, a backward inside has no effect
Tree: TypeAlias = Any  # a tensor, or lists, tuples, mappings and iterators of trees


def flatten(tree: Tree, name: str) -> tuple[tuple[Tensor, ...], Tree]:
    """Return the tensors of ``tree`` in order, and its structure for `same_structure`.

    An iterator such as ``model.parameters()`` can be walked once, so the structure is a realised copy.
    """
    if isinstance(tree, Tensor):
        return (tree,), tree
    if isinstance(tree, Mapping):
        children: list[Tree] = list(tree.values())
        structure: Tree = tree
    elif isinstance(tree, Iterable) and not isinstance(tree, (str, bytes)):
        children = list(tree)
        structure = tree if isinstance(tree, Sequence) else children
    else:
        raise TensorError(f"{name} must hold tensors only, got {type(tree).__name__}: pass a list of tensors.")
    leaves: list[Tensor] = []
    for child in children:
        leaves.extend(flatten(child, name)[0])
    return tuple(leaves), structure


def same_structure(structure: Tree, leaves: Sequence[Tensor]) -> Tree:
    """Arrange ``leaves`` as in ``structure``; a list or iterator of tensors at the top becomes a tuple."""
    built = rebuilt(structure, leaves)
    return tuple(built) if isinstance(built, list) else built


def rebuilt(structure: Tree, leaves: Sequence[Tensor]) -> Tree:
    """Arrange ``leaves`` as in ``structure``; lists stay lists."""
    return _rebuild(structure, iter(leaves))


def _rebuild(structure: Tree, leaves: Iterator[Tensor]) -> Tree:
    if isinstance(structure, Tensor):
        return next(leaves)
    if isinstance(structure, Mapping):
        return {key: _rebuild(child, leaves) for key, child in structure.items()}
    children = [_rebuild(child, leaves) for child in structure]
    if hasattr(structure, "_fields"):  # a NamedTuple takes its fields one by one
        return type(structure)(*children)
    return tuple(children) if isinstance(structure, tuple) else children


def check_levels(upper: Sequence[Tensor], lower: Sequence[Tensor]) -> None:
    """Reject tensors that no hypergradient can be taken for.

    Raises:
        TensorError: A level is empty or entirely frozen, holds a sparse, complex, integer or sharded tensor, or a
            tensor occurs twice (in one level or in both).
    """
    seen: dict[int, str] = {}
    for name, tensors in (("upper", upper), ("lower", lower)):
        if not tensors:
            raise TensorError(f"{name}=[] holds no tensor: pass the tensors that are the {name} variable.")
        for index, tensor in enumerate(tensors):
            where = f"{name}[{index}]"
            refuse_parts(where, tensor, "tensor")
            if tensor.layout is not torch.strided:
                raise TensorError(f"{where} has layout {tensor.layout}: only dense ones can be differentiated twice.")
            if not tensor.is_floating_point():
                raise TensorError(f"{where} has dtype {tensor.dtype}: only real floating tensors can be stepped.")
            if id(tensor) in seen:
                raise TensorError(f"{where} is the same tensor as {seen[id(tensor)]}: pass every tensor once.")
            seen[id(tensor)] = where
        if not any(tensor.requires_grad for tensor in tensors):
            raise TensorError(f"No tensor of {name} requires a gradient: call requires_grad_() on what is optimized.")


def guarded(tensors: Sequence[Tensor], process_group: Group = None, **options: object) -> Guard:
    """Return the guard under which closures run; used as a context it puts everything back after an exception.

    Args:
        tensors: What may move.
        process_group: The processes.
        options: What has to be the same on all of them. It is compared on the CPU, where that waits for no device.
    """
    compared = options if on_cpu(tensors) else {}
    return Guard(tensors, Workspace(group=checked("process_group", process_group), options=lambda: compared))


def evaluate(guard: Guard, closure: Closure, name: str, random: RandomState | None = None) -> Tensor:
    """Call ``closure`` once and return its loss with its graph, an attached real scalar.

    Raises:
        ClosureError: ``closure`` is not callable, or returned something else.
    """
    check_callable(closure, name)
    try:
        loss = guard.attached(closure, random)
    except ClosureError as error:
        raise ClosureError(f"{name}: {error}") from error
    if not loss.requires_grad or not loss.is_floating_point():
        raise ClosureError(f"{name} returned a loss without a graph: compute it with gradients, not under no_grad().")
    return loss


def check_callable(closure: Closure, name: str) -> None:
    """Reject what is no function."""
    if not callable(closure):
        raise ClosureError(f"{name}={closure!r} is not callable: pass a function of no arguments returning the loss.")
