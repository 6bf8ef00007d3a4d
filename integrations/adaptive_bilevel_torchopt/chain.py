"""Transformations one after another, with the loss for those that take it, and the optimizers that are such chains.

TorchOpt's own ``chain`` does not pass the extra arguments ``value``, ``grad`` and ``value_fn``; `chain` here passes
them to those that take them, and so does `FuncOptimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.policies import Outcome

from ._host import Memory, Transformation, Tree, torchopt
from .transform import (
    GradientTransformationExtraArgs,
    LossFunction,
    ScaleByPolicyState,
    scale_by_decsps,
    scale_by_sls,
    scale_by_slsb,
    scale_by_spsb,
    scale_by_spsmax,
)
from .trees import cloned, either

__all__ = ["FuncOptimizer", "chain", "decsps", "sls", "slsb", "spsb", "spsmax"]


def spsmax(bound: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Gradient descent with SPS_max steps, in the place of ``torchopt.sgd(lr)``.

    Args:
        bound: As in `scale_by_spsmax`.
        options: Likewise.

    >>> optimizer = FuncOptimizer(spsmax())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> loss = lambda params: (params[0] ** 2).sum() / 2
    >>> for _ in range(10):
    ...     params = optimizer.step(loss(params), params, value_fn=loss)
    >>> bool(loss(params) < 0.1)
    True
    """
    return chain(torchopt.sgd(lr=1.0), scale_by_spsmax(bound, **options))


def spsb(bound: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Gradient descent with SPSB steps, in the place of ``torchopt.sgd(lr)``.

    Args:
        bound: As in `scale_by_spsb`.
        options: Likewise.

    >>> optimizer = FuncOptimizer(spsb())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> loss = lambda params: (params[0] ** 2).sum() / 2
    >>> for _ in range(10):
    ...     params = optimizer.step(loss(params), params, value_fn=loss)
    >>> bool(loss(params) < 0.1)
    True
    """
    return chain(torchopt.sgd(lr=1.0), scale_by_spsb(bound, **options))


def decsps(bound: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Gradient descent with DecSPS steps, in the place of ``torchopt.sgd(lr)``.

    Args:
        bound: As in `scale_by_decsps`.
        options: Likewise.

    >>> optimizer = FuncOptimizer(decsps())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> loss = lambda params: (params[0] ** 2).sum() / 2
    >>> for _ in range(10):
    ...     params = optimizer.step(loss(params), params, value_fn=loss)
    >>> bool(loss(params) < 0.1)
    True
    """
    return chain(torchopt.sgd(lr=1.0), scale_by_decsps(bound, **options))


def sls(start: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Gradient descent with SLS steps, in the place of ``torchopt.sgd(lr)``.

    Args:
        start: As in `scale_by_sls`.
        options: Likewise.

    >>> optimizer = sls()
    >>> loss = lambda params: (params[0] ** 2 * torch.tensor([1.0, 10.0])).sum()
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> state = optimizer.init(params)
    >>> for _ in range(60):
    ...     value = loss(params)
    ...     grad = torch.autograd.grad(value, params)
    ...     updates, state = optimizer.update(
    ...         grad, state, params=params, inplace=False, value=value, grad=grad, value_fn=loss
    ...     )
    ...     params = torchopt.apply_updates(params, updates)
    >>> bool(loss(params) < 1e-6)
    True
    """
    return chain(torchopt.sgd(lr=1.0), scale_by_sls(start, **options))


def slsb(bound: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Gradient descent with SLSB steps, in the place of ``torchopt.sgd(lr)``.

    Args:
        bound: As in `scale_by_slsb`.
        options: Likewise.

    >>> optimizer = FuncOptimizer(slsb())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> loss = lambda params: (params[0] ** 2).sum() / 2
    >>> for _ in range(10):
    ...     params = optimizer.step(loss(params), params, value_fn=loss)
    >>> bool(loss(params) < 0.1)
    True
    """
    return chain(torchopt.sgd(lr=1.0), scale_by_slsb(bound, **options))


def chain(*transformations: Transformation) -> GradientTransformationExtraArgs:
    """Apply transformations in order, and pass value, grad and value_fn to those that take them.

    Where a step size finds the loss or a slope not finite, the updates leave as zeros and all memories stay as they
    were (a part's Python numbers, as RADAM's count, go on if the outcome is a tensor); only the record is new.

    Args:
        transformations: Of this module, and any of TorchOpt's.

    Raises:
        OptionError: One is no GradientTransformation.

    >>> transformation = chain(torchopt.adam(lr=1.0), scale_by_slsb())
    >>> optimizer = FuncOptimizer(transformation)
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> loss = lambda params: (params[0] ** 2).sum() / 2
    >>> for _ in range(30):
    ...     params = optimizer.step(loss(params), params, value_fn=loss)
    >>> bool(loss(params) < 0.1)
    True
    """
    for given in transformations:
        if not isinstance(given, torchopt.base.GradientTransformation):
            raise OptionError(
                f"chain({given!r}): pass GradientTransformations, e.g. torchopt.sgd(lr=1.0), scale_by_sls()"
            )

    def init_fn(params: Tree) -> tuple[Memory, ...]:
        return tuple(t.init(params) for t in transformations)

    def update_fn(
        updates: Tree, state: Sequence[Memory], *, params: Tree = None, inplace: bool = True, **extra: object
    ) -> tuple[Tree, tuple[Memory, ...]]:
        memories = tuple(state)
        if inplace and any(isinstance(t, GradientTransformationExtraArgs) for t in transformations):
            # The first part would scale in place the very gradients that the slope is taken with, and all parts their
            # memories, which may have to be kept.
            updates, memories = cloned(updates), cloned(memories)
        after = []
        for transformation, memory in zip(transformations, memories, strict=True):
            takes = extra if isinstance(transformation, GradientTransformationExtraArgs) else {}
            updates, memory = transformation.update(updates, memory, params=params, inplace=inplace, **takes)
            after.append(memory)
        return _unless_skipped(updates, tuple(after), tuple(state))

    return GradientTransformationExtraArgs(init_fn, update_fn)


class FuncOptimizer(torchopt.FuncOptimizer):
    """``torchopt.FuncOptimizer`` that passes the loss and its gradients on to the transformation.

    Args:
        impl: The transformation, e.g. `spsmax()` or a `chain`.
        inplace: As in ``torchopt.FuncOptimizer``.

    >>> optimizer = FuncOptimizer(spsmax())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> for _ in range(3):
    ...     params = optimizer.step((params[0] ** 2).sum() / 2, params)
    >>> params[0].tolist()
    [0.375, 0.25]
    """

    def step(
        self, loss: Tensor, params: Tree, inplace: bool | None = None, *, value_fn: LossFunction | None = None
    ) -> Tree:
        """Return the parameters after a step, attached to the graph of `loss`.

        Args:
            loss: The loss at `params`.
            params: A tree of tensors.
            inplace: Whether to change them in place; None: as given to the constructor.
            value_fn: The loss as a function of such a tree, on the same sample; for searches.
        """
        if isinstance(self.optim_state, torchopt.base.UninitializedState):
            self.optim_state = self.impl.init(params)
        leaves, structure = torchopt.pytree.tree_flatten(params)
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        grad = torchopt.pytree.tree_unflatten(structure, list(found))
        inplace = self.inplace if inplace is None else inplace
        takes = isinstance(self.impl, GradientTransformationExtraArgs)
        extra = {"value": loss, "grad": grad, "value_fn": value_fn} if takes else {}
        update: Callable[..., tuple[Tree, Memory]] = self.impl.update
        updates, self.optim_state = update(grad, self.optim_state, params=params, inplace=inplace, **extra)
        return torchopt.apply_updates(params, updates, inplace=inplace)


def _is_policy_state(node: object) -> bool:
    return isinstance(node, ScaleByPolicyState)


def _unless_skipped(updates: Tree, after: Memory, before: Memory) -> tuple[Tree, Memory]:
    """Return the updates and the states after a step; zeros and the memories before it where it was not finite."""
    new, structure = torchopt.pytree.tree_flatten(after, is_leaf=_is_policy_state, none_is_leaf=True)
    valid: Tensor | bool = True
    for leaf in new:
        if _is_policy_state(leaf):
            valid = valid & (leaf.record.outcome != int(Outcome.non_finite))
    if valid is True:
        return updates, after
    old = torchopt.pytree.tree_leaves(before, is_leaf=_is_policy_state, none_is_leaf=True)
    # A policy keeps its own state by itself.
    kept = [n if _is_policy_state(n) else either(valid, n, o) for n, o in zip(new, old, strict=True)]
    zeroed = torchopt.pytree.tree_map(lambda u: either(valid, u, torch.zeros_like(u)), updates)
    return zeroed, torchopt.pytree.tree_unflatten(structure, kept)
