"""Step sizes as GradientTransformations, in TorchOpt's style and with optax's extra arguments.

``update(updates, state, *, params=None, inplace=True, value=, grad=, value_fn=)``: `value` is the loss, `grad` its
gradients, `value_fn` a function of the parameters that returns the loss on the same sample (for searches; Polyak rules
without a bound try their first one with it where it is given, so leave it out under ``vmap``). The incoming updates u
are a descent direction, as ``torchopt.sgd(lr=1.0)`` or ``torchopt.adam(lr=1.0)`` make them, and leave multiplied by the
step size; the slope is the true one, -<grad, u>. Where it is not positive, or the loss is not
finite, or a search fails, the updates leave as zeros, and `state.record` says why. After a loss or gradients that are
not finite, a `chain` also keeps the memories of its other parts, whatever the number of such steps: a transformation
does not count them, so look at ``record.outcome`` where training may have gone bad for good.

TorchOpt's own ``chain`` has no way for the extra arguments; `chain` here passes them to those that take them.

Differentiating through the updates (``torchopt.FuncOptimizer``, ``inplace=False``): a Polyak step enters the graph as
a constant, unless ``differentiable=True``; then its dependence on loss and gradients is differentiated too. A search's
step is piecewise constant in the problem, so it always is a constant. Through a Polyak step that met what is not finite
the gradient is not finite either, since tensors are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive_bilevel import policies
from adaptive_bilevel.errors import ClosureError, OptionError, TensorError
from adaptive_bilevel.evaluation.vectors import inner
from adaptive_bilevel.policies import Context, Outcome, Record
from adaptive_bilevel.policies.scalars import resolution

from ._host import torchopt
from .direction import either

__all__ = [
    "FuncOptimizer",
    "GradientTransformationExtraArgs",
    "ScaleByPolicyState",
    "chain",
    "check_policy",
    "decsps",
    "scale_by_decsps",
    "scale_by_policy",
    "scale_by_sls",
    "scale_by_slsb",
    "scale_by_spsb",
    "scale_by_spsmax",
    "slope_along",
    "sls",
    "slsb",
    "spsb",
    "spsmax",
    "tree_leaves",
    "without_graphs",
]

_SEARCHES = (policies.SLS, policies.SLSB)


class GradientTransformationExtraArgs(torchopt.base.GradientTransformation):
    """A GradientTransformation whose ``update`` also takes ``value``, ``grad`` and ``value_fn``."""


class ScaleByPolicyState(NamedTuple):
    """State of a step size.

    Attributes:
        policy: The policy's state.
        record: The last step's record; None before.
    """

    policy: Any
    record: Record | None = None


def scale_by_policy(policy: Any, *, differentiable: bool = False) -> Any:
    """Scale updates by the step size of a policy of ``adaptive_bilevel.policies``.

    Args:
        policy: E.g. ``policies.SPSB()``.
        differentiable: Whether a Polyak step is differentiated through; a constant by default.

    Raises:
        OptionError: Not a policy, or a search that is to be differentiated.
    """
    check_policy("scale_by_policy", policy, differentiable)
    searches = isinstance(policy, _SEARCHES)
    name = type(policy).__name__

    def init_fn(params: Any) -> ScaleByPolicyState:
        return ScaleByPolicyState(policy.init())

    def update_fn(
        updates: Any,
        state: ScaleByPolicyState,
        *,
        params: Any = None,
        inplace: bool = True,
        value: Tensor | float | None = None,
        grad: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, ScaleByPolicyState]:
        _require(name, value=value, grad=grad)
        slope = -slope_along(f"scale_by_{name.lower()}", grad, updates)
        loss = torch.as_tensor(value)
        if not differentiable:
            loss, slope = loss.detach(), slope.detach()
        if searches:
            _require(name, params=params, value_fn=value_fn)
            trial = _trial(updates, params, value_fn)
            context = Context(float(loss), float(slope), trial, rounding=resolution(loss))
            record, after = policy.propose(state.policy, context)
        else:
            trial = None
            if value_fn is not None and params is not None and not differentiable and _is_first(state.policy):
                trial = _trial(updates, params, value_fn)
            record, after = policy.propose(state.policy, Context(loss, slope, trial))
            if trial is not None and not record.moved:
                after = state.policy  # the same, and its numbers still tell that there was no step
        return _scaled(updates, record.step_size, inplace), ScaleByPolicyState(after, without_graphs(record))

    return GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_spsmax(bound: float | None = None, *, differentiable: bool = False, **options: Any) -> Any:
    """Scale by min{(value - lower_bound) / (c slope), bound}: `adaptive_bilevel.policies.SPSMax`, eq. (5)."""
    return scale_by_policy(policies.SPSMax(bound=bound, **options), differentiable=differentiable)


def scale_by_spsb(bound: float | None = None, *, differentiable: bool = False, **options: Any) -> Any:
    """Scale by Polyak's ratio under a decaying bound: `adaptive_bilevel.policies.SPSB`, eq. (7)."""
    return scale_by_policy(policies.SPSB(bound=bound, **options), differentiable=differentiable)


def scale_by_decsps(bound: float | None = None, *, differentiable: bool = False, **options: Any) -> Any:
    """Scale by Polyak's ratio, never increasing: `adaptive_bilevel.policies.DecSPS`, eq. (6)."""
    return scale_by_policy(policies.DecSPS(bound=bound, **options), differentiable=differentiable)


def scale_by_sls(start: float | None = None, **options: Any) -> Any:
    """Scale by the step of a line search: `adaptive_bilevel.policies.SLS`, eq. (8)."""
    return scale_by_policy(policies.SLS(start=start, **options))


def scale_by_slsb(bound: float | None = None, **options: Any) -> Any:
    """Scale by the step of a line search under a decaying bound: `adaptive_bilevel.policies.SLSB`."""
    return scale_by_policy(policies.SLSB(bound=bound, **options))


def spsmax(bound: float | None = None, **options: Any) -> Any:
    """Gradient descent with SPS_max steps, in the place of ``torchopt.sgd(lr)``."""
    return chain(torchopt.sgd(lr=1.0), scale_by_spsmax(bound, **options))


def spsb(bound: float | None = None, **options: Any) -> Any:
    """Gradient descent with SPSB steps, in the place of ``torchopt.sgd(lr)``."""
    return chain(torchopt.sgd(lr=1.0), scale_by_spsb(bound, **options))


def decsps(bound: float | None = None, **options: Any) -> Any:
    """Gradient descent with DecSPS steps, in the place of ``torchopt.sgd(lr)``."""
    return chain(torchopt.sgd(lr=1.0), scale_by_decsps(bound, **options))


def sls(start: float | None = None, **options: Any) -> Any:
    """Gradient descent with SLS steps, in the place of ``torchopt.sgd(lr)``.

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


def slsb(bound: float | None = None, **options: Any) -> Any:
    """Gradient descent with SLSB steps, in the place of ``torchopt.sgd(lr)``."""
    return chain(torchopt.sgd(lr=1.0), scale_by_slsb(bound, **options))


def chain(*transformations: Any) -> Any:
    """Apply transformations in order, and pass value, grad and value_fn to those that take them.

    Where a step size finds the loss or a slope not finite, the updates leave as zeros and all memories stay as they
    were (a part's Python numbers, as RADAM's count, go on if the outcome is a tensor); only the record is new.

    Args:
        transformations: Of this module, and any of TorchOpt's.

    Raises:
        OptionError: One is no GradientTransformation.
    """
    for given in transformations:
        if not isinstance(given, torchopt.base.GradientTransformation):
            raise OptionError(
                f"chain({given!r}): pass GradientTransformations, e.g. torchopt.sgd(lr=1.0), scale_by_sls()"
            )

    def init_fn(params: Any) -> tuple[Any, ...]:
        return tuple(t.init(params) for t in transformations)

    def update_fn(
        updates: Any, state: Sequence[Any], *, params: Any = None, inplace: bool = True, **extra: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        memories: Any = tuple(state)
        if inplace and any(isinstance(t, GradientTransformationExtraArgs) for t in transformations):
            # The first part would scale in place the very gradients that the slope is taken with, and all parts their
            # memories, which may have to be kept.
            updates, memories = (torchopt.pytree.tree_map(_cloned, tree) for tree in (updates, memories))
        after = []
        for transformation, memory in zip(transformations, memories, strict=True):
            takes = extra if isinstance(transformation, GradientTransformationExtraArgs) else {}
            updates, memory = transformation.update(updates, memory, params=params, inplace=inplace, **takes)
            after.append(memory)
        return _unless_skipped(updates, tuple(after), tuple(state))

    return GradientTransformationExtraArgs(init_fn, update_fn)


class FuncOptimizer(torchopt.FuncOptimizer):
    """``torchopt.FuncOptimizer`` that tells the transformation the loss and its gradients.

    >>> optimizer = FuncOptimizer(spsmax())
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> for _ in range(3):
    ...     params = optimizer.step((params[0] ** 2).sum() / 2, params)
    >>> params[0].tolist()
    [0.375, 0.25]
    """

    def step(
        self, loss: Tensor, params: Any, inplace: bool | None = None, *, value_fn: Callable[[Any], Any] | None = None
    ) -> Any:
        """Return the parameters after a step, attached to the graph of `loss`.

        Args:
            loss: The loss at `params`.
            params: A tree of tensors.
            inplace: Whether to change them in place; None: as the constructor was told.
            value_fn: The loss as a function of such a tree, on the same sample; for searches.
        """
        if isinstance(self.optim_state, torchopt.base.UninitializedState):
            self.optim_state = self.impl.init(params)
        leaves, structure = torchopt.pytree.tree_flatten(params)
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        grad = torchopt.pytree.tree_unflatten(structure, list(found))
        inplace = self.inplace if inplace is None else inplace
        takes = isinstance(self.impl, GradientTransformationExtraArgs)
        extra: dict[str, Any] = {"value": loss, "grad": grad, "value_fn": value_fn} if takes else {}
        update: Any = self.impl.update
        updates, self.optim_state = update(grad, self.optim_state, params=params, inplace=inplace, **extra)
        return torchopt.apply_updates(params, updates, inplace=inplace)


def _require(name: str, **given: Any) -> None:
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise ClosureError(
            f"scale_by_{name.lower()}: update() was not given {', '.join(missing)}. Call update(updates, state, "
            "params=params, value=loss, grad=grad, value_fn=loss_function) on a chain() of adaptive_bilevel_torchopt, "
            "or its FuncOptimizer(...).step(loss, params, value_fn=...); torchopt.chain and torchopt.FuncOptimizer "
            "drop them (for Polyak steps there, see PolyakLR)"
        )


def check_policy(owner: str, policy: Any, differentiable: bool) -> None:
    """Refuse what is no policy, or is a search that is to be differentiated.

    Raises:
        OptionError: It is one of these.
    """
    if isinstance(policy, type) or not (hasattr(policy, "init") and hasattr(policy, "propose")):
        raise OptionError(f"{owner}(policy={policy!r}): pass a policy, e.g. adaptive_bilevel.policies.SPSB()")
    if isinstance(policy, _SEARCHES) and differentiable:
        raise OptionError(
            f"{owner}(policy={policy!r}, differentiable=True): the step of a search is piecewise constant in the "
            "problem, so there is nothing to differentiate; leave it out, or take a Polyak rule"
        )


def slope_along(owner: str, grads: Any, directions: Any) -> Tensor:
    """Return <grads, directions> of two trees, over the leaves of which neither is None.

    Raises:
        TensorError: Their leaves do not fit.
    """
    left, right = tree_leaves(grads), tree_leaves(directions)
    pairs = [(g, d) for g, d in zip(left, right, strict=False) if g is not None and d is not None]
    if len(left) != len(right) or any(g.shape != d.shape for g, d in pairs):
        shapes = [[None if t is None else tuple(t.shape) for t in leaves] for leaves in (left, right)]
        raise TensorError(
            f"{owner}: gradients of shapes {shapes[0]} for directions of shapes {shapes[1]}; pass one for each"
        )
    return inner([g for g, _ in pairs], [d for _, d in pairs])


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, None included."""
    return list(torchopt.pytree.tree_leaves(tree, none_is_leaf=True))


def _is_first(state: Any) -> bool:
    """Return whether a bound is to be found and no step has moved yet, without a look at a tensor."""
    found = getattr(state, "found", None)
    return isinstance(found, float) and found == 0.0


def _trial(updates: Any, params: Any, value_fn: Any) -> Callable[[float], float]:
    def trial(step: float) -> float:
        # Scaled, then added, as the step that is taken will be.
        with torch.no_grad():
            scaled = _scaled(updates, step, inplace=False)
            candidate = torchopt.apply_updates(params, scaled, inplace=False)
            return float(value_fn(candidate))

    return trial


def _scaled(updates: Any, step: Any, inplace: bool) -> Any:
    """Return the updates times the step; zeros for a step of 0, whatever the updates are."""
    if not isinstance(step, Tensor) and step == 0.0:
        scale: Callable[[Tensor], Tensor] = lambda u: u.zero_() if inplace else torch.zeros_like(u)  # noqa: E731
    elif isinstance(step, Tensor):

        def scale(u: Tensor) -> Tensor:
            length = step.to(device=u.device, dtype=u.dtype)
            scaled = torch.where(length > 0, u * length, torch.zeros_like(u))
            return u.copy_(scaled) if inplace else scaled

    else:
        scale = lambda u: u.mul_(step) if inplace else u.mul(step)  # noqa: E731
    return torchopt.pytree.tree_map(scale, updates)


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _is_policy_state(node: Any) -> bool:
    return isinstance(node, ScaleByPolicyState)


def _unless_skipped(updates: Any, after: Any, before: Any) -> tuple[Any, Any]:
    """Return the updates and the states after a step; zeros and the memories before it where it was not finite."""
    new, structure = torchopt.pytree.tree_flatten(after, is_leaf=_is_policy_state, none_is_leaf=True)
    valid: Any = True
    for leaf in filter(_is_policy_state, new):
        valid = valid & (leaf.record.outcome != int(Outcome.non_finite))
    if valid is True:
        return updates, after
    old = torchopt.pytree.tree_leaves(before, is_leaf=_is_policy_state, none_is_leaf=True)
    # A policy keeps its own state by itself.
    kept = [n if _is_policy_state(n) else either(valid, n, o) for n, o in zip(new, old, strict=True)]
    zeroed = torchopt.pytree.tree_map(lambda u: either(valid, u, torch.zeros_like(u)), updates)
    return zeroed, torchopt.pytree.tree_unflatten(structure, kept)


def without_graphs(record: Record) -> Record:
    """Return the record without graphs."""
    return Record._make(v.detach() if isinstance(v, Tensor) else v for v in record)
