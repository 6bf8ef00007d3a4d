"""Step sizes as GradientTransformations, in TorchOpt's style and with optax's extra arguments.

``update(updates, state, *, params=None, inplace=True, value=, grad=, value_fn=)``: `value` is the loss, `grad` its
gradients, `value_fn` a function of the parameters that returns the loss on the same sample (for searches; Polyak rules
without a bound try their first one with it where it is given, so leave it out under ``vmap``). The incoming updates u
are a descent direction, as ``torchopt.sgd(lr=1.0)`` or ``torchopt.adam(lr=1.0)`` make them, and leave multiplied by the
step size; the slope is the true one, -<grad, u>. Where it is not positive, or the loss is not
finite, or a search fails, the updates leave as zeros, and `state.record` says why. After a loss or gradients that are
not finite, a `chain` also keeps the memories of its other parts, whatever the number of such steps: a transformation
does not count them, so look at ``record.outcome`` if training may have failed.

TorchOpt's own ``chain`` does not pass the extra arguments; `chain` here passes them to those that take them.

Differentiating through the updates (``torchopt.FuncOptimizer``, ``inplace=False``): a Polyak step enters the graph as
a constant, unless ``differentiable=True``; then its dependence on loss and gradients is differentiated too. A search's
step is piecewise constant in the problem, so it always is a constant. Through a Polyak step that met what is not finite
the gradient is not finite either, since tensors are not looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from adaptive_bilevel import policies
from adaptive_bilevel.errors import ClosureError, OptionError, warn
from adaptive_bilevel.evaluation.attempts import Attempts
from adaptive_bilevel.evaluation.parts import require_whole
from adaptive_bilevel.optim.closure_checks import ClosureChecks
from adaptive_bilevel.policies import Context, Policy, Record
from adaptive_bilevel.policies.scalars import resolution

from ._host import Memory, Tree, torchopt
from .refusals import IN_PARTS
from .trees import scaled, slope_along, tree_leaves

__all__ = [
    "AnyPolicy",
    "GradientTransformationExtraArgs",
    "LossFunction",
    "ScaleByPolicyState",
    "check_policy",
    "scale_by_decsps",
    "scale_by_policy",
    "scale_by_sls",
    "scale_by_slsb",
    "scale_by_spsb",
    "scale_by_spsmax",
    "without_graphs",
]

_SEARCHES = (policies.SLS, policies.SLSB)

AnyPolicy: TypeAlias = Policy[Any]
"""A policy, whatever its state."""

LossFunction: TypeAlias = Callable[[Tree], "Tensor | float"]
"""Returns the loss at a tree of parameters, on the same sample each time."""


class UpdateExtraArgs(Protocol):
    """The ``update`` of a transformation that takes the loss."""

    def __call__(
        self,
        updates: Tree,
        state: Memory,
        *,
        params: Tree = None,
        inplace: bool = True,
        value: Tensor | float | None = None,
        grad: Tree = None,
        value_fn: LossFunction | None = None,
    ) -> tuple[Tree, Memory]:
        """Return the updates and the next state."""
        ...


class GradientTransformationExtraArgs(torchopt.base.GradientTransformation):
    """A GradientTransformation whose ``update`` also takes ``value``, ``grad`` and ``value_fn``.

    Args:
        init: params -> state.
        update: See the module.
    """

    update: UpdateExtraArgs


class ScaleByPolicyState(NamedTuple):
    """State of a step size.

    Attributes:
        policy: The policy's state.
        record: The last step's record; None before.
    """

    policy: Memory
    record: Record | None = None


def scale_by_policy(policy: AnyPolicy, *, differentiable: bool = False) -> GradientTransformationExtraArgs:
    """Scale updates by the step size of a policy of ``adaptive_bilevel.policies``.

    A search warns once if ``value_fn`` changes at the same point, or does not depend on the parameters.

    Args:
        policy: E.g. ``policies.SPSB()``.
        differentiable: Whether a Polyak step is differentiated through; a constant by default.

    Raises:
        OptionError: Not a policy, or a search that is to be differentiated.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.sgd(lr=1.0), scale_by_policy(policies.SPSB())))
    >>> params = (torch.tensor([3.0, 2.0], requires_grad=True),)
    >>> for _ in range(10):
    ...     params = optimizer.step((params[0] ** 2).sum() / 2, params)
    >>> bool(params[0].norm() < 0.1)
    True
    """
    check_policy("scale_by_policy", policy, differentiable)
    searches = isinstance(policy, _SEARCHES)
    name = type(policy).__name__
    checks = ClosureChecks()

    def init_fn(params: Tree) -> ScaleByPolicyState:
        require_whole(f"scale_by_{name.lower()}", tree_leaves(params), IN_PARTS)
        return ScaleByPolicyState(policy.init())

    def update_fn(
        updates: Tree,
        state: ScaleByPolicyState,
        *,
        params: Tree = None,
        inplace: bool = True,
        value: Tensor | float | None = None,
        grad: Tree = None,
        value_fn: LossFunction | None = None,
    ) -> tuple[Tree, ScaleByPolicyState]:
        _require(name, value=value, grad=grad)
        slope = -slope_along(f"scale_by_{name.lower()}", grad, updates)
        loss = torch.as_tensor(value)
        if not differentiable:
            loss, slope = loss.detach(), slope.detach()
        attempts = Attempts()
        if searches:
            _require(name, params=params, value_fn=value_fn)
            assert value_fn is not None
            trial = _trial(updates, params, value_fn, attempts)
            number, rounding = float(loss), resolution(loss)
            tensors, along = ([t for t in tree_leaves(tree) if t is not None] for tree in (params, updates))
            trials = checks.watch(trial, number, float(slope), rounding, tensors, along)
            record, after = policy.propose(state.policy, Context(number, float(slope), trials, rounding=rounding))
            attempts.conclude(record.moved)
            record, after = trials.conclude(record, after, state.policy, functools.partial(trial, 0.0))
            for message in checks.take():
                warn(f"scale_by_{name.lower()}: {message}")
        else:
            trial = None
            if value_fn is not None and params is not None and not differentiable and _is_first(state.policy):
                trial = _trial(updates, params, value_fn, attempts)
            record, after = policy.propose(state.policy, Context(loss, slope, trial))
            attempts.conclude(trial is None or record.moved)
            if trial is not None and not record.moved:
                after = state.policy  # the same, and its numbers still tell that there was no step
        return scaled(updates, record.step_size, inplace), ScaleByPolicyState(after, without_graphs(record))

    return GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_spsmax(
    bound: float | None = None, *, differentiable: bool = False, **options: Any
) -> GradientTransformationExtraArgs:
    """Scale by min{(value - lower_bound) / (c slope), bound}: `adaptive_bilevel.policies.SPSMax`, eq. (5).

    Args:
        bound: As in `adaptive_bilevel.policies.SPSMax`.
        differentiable: As in `scale_by_policy`.
        options: The other options of that policy.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.adam(lr=1.0), scale_by_spsmax()))
    """
    return scale_by_policy(policies.SPSMax(bound=bound, **options), differentiable=differentiable)


def scale_by_spsb(
    bound: float | None = None, *, differentiable: bool = False, **options: Any
) -> GradientTransformationExtraArgs:
    """Scale by Polyak's ratio under a decaying bound: `adaptive_bilevel.policies.SPSB`, eq. (7).

    Args:
        bound: As in `adaptive_bilevel.policies.SPSB`.
        differentiable: As in `scale_by_policy`.
        options: The other options of that policy.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.adam(lr=1.0), scale_by_spsb()))
    """
    return scale_by_policy(policies.SPSB(bound=bound, **options), differentiable=differentiable)


def scale_by_decsps(
    bound: float | None = None, *, differentiable: bool = False, **options: Any
) -> GradientTransformationExtraArgs:
    """Scale by Polyak's ratio, never increasing: `adaptive_bilevel.policies.DecSPS`, eq. (6).

    Args:
        bound: As in `adaptive_bilevel.policies.DecSPS`.
        differentiable: As in `scale_by_policy`.
        options: The other options of that policy.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.adam(lr=1.0), scale_by_decsps()))
    """
    return scale_by_policy(policies.DecSPS(bound=bound, **options), differentiable=differentiable)


def scale_by_sls(start: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Scale by the step of a line search: `adaptive_bilevel.policies.SLS`, eq. (8).

    Args:
        start: As in `adaptive_bilevel.policies.SLS`.
        options: The other options of that policy.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.adam(lr=1.0), scale_by_sls()))
    """
    return scale_by_policy(policies.SLS(start=start, **options))


def scale_by_slsb(bound: float | None = None, **options: Any) -> GradientTransformationExtraArgs:
    """Scale by the step of a line search under a decaying bound: `adaptive_bilevel.policies.SLSB`.

    Args:
        bound: As in `adaptive_bilevel.policies.SLSB`.
        options: The other options of that policy.

    >>> from adaptive_bilevel_torchopt import FuncOptimizer, chain
    >>> optimizer = FuncOptimizer(chain(torchopt.adam(lr=1.0), scale_by_slsb()))
    """
    return scale_by_policy(policies.SLSB(bound=bound, **options))


def _require(name: str, **given: object) -> None:
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise ClosureError(
            f"scale_by_{name.lower()}: update() was not given {', '.join(missing)}. Call update(updates, state, "
            "params=params, value=loss, grad=grad, value_fn=loss_function) on a chain() of adaptive_bilevel_torchopt, "
            "or its FuncOptimizer(...).step(loss, params, value_fn=...); torchopt.chain and torchopt.FuncOptimizer "
            "drop them (for Polyak steps there, see PolyakLR)"
        )


def check_policy(owner: str, policy: object, differentiable: bool) -> None:
    """Reject what is no policy, or is a search that is to be differentiated.

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


def _is_first(state: object) -> bool:
    """Return whether a bound is to be found and no step has moved yet, without a look at a tensor."""
    found = getattr(state, "found", None)
    return isinstance(found, float) and found == 0.0


def _trial(updates: Tree, params: Tree, value_fn: LossFunction, attempts: Attempts) -> Callable[[float], float]:
    def trial(step: float) -> float:
        # Scaled, then added, as the step that is taken will be.
        with torch.no_grad():
            candidate = torchopt.apply_updates(params, scaled(updates, step, inplace=False), inplace=False)
            return float(attempts.value(lambda: value_fn(candidate)))

    return trial


def without_graphs(record: Record) -> Record:
    """Return the record without graphs."""
    return Record._make(v.detach() if isinstance(v, Tensor) else v for v in record)
