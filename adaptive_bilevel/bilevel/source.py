"""Where the hypergradient of an upper step comes from: ``.grad``, tensors, an estimator, or the upper loss itself.

| ``hypergradient=`` | h |
|---|---|
| None | what ``.grad`` of the upper parameters holds when the step is called |
| tensors (at a step only) | these, one for each upper parameter, or None where there is none |
| `adaptive_bilevel.hypergradient.Implicit` | f_x - C P f_y with its solver |
| a callable | what ``h(upper_closure, lower_closure, x, y)`` returns; `implicit` is one |
| "direct" | the gradient of the upper loss itself |

The last is for losses of x alone. One is that whose closure runs the inner loop, differentiably (learned inner learning
rates, MAML, distillation through a trajectory): each trial runs the loop again. Another is that of penalty methods
(F2SA, BOME): their h is the gradient of f(x, y) + lambda (g(x, y) - g(x, z)) with y and z held, and no product with a
Hessian is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ..errors import ClosureError, HypergradientError, LowerLevelError, OptionError
from ..evaluation.closures import Closure
from ..evaluation.counts import Evaluations
from ..evaluation.guard import Guard, RandomState
from ..evaluation.objective import Evaluated, Objective
from ..evaluation.processes import Group
from ..hypergradient import Implicit, implicit_with_info
from .hidden_level import HiddenLevel
from .lower import LowerProblem

__all__ = ["DIRECT", "DirectLoss", "Source", "checked_source", "estimated", "matched"]

DIRECT = "direct"

Source: TypeAlias = Implicit | Callable[[Closure, Closure, Any, Any], Any] | str | None
"""What the option ``hypergradient`` of an upper optimizer is."""

_DETACHED = (
    "the upper loss has no path to the upper parameters, although hypergradient='direct' says that it is a function of "
    "them alone. Its inner loop ran before the step, under no_grad, or without create_graph=True: write\n"
    "    def upper_loss():  # the loop is inside, each of its gradients taken with create_graph=True\n"
    "        return validation_loss(inner_loop(x))"
)


def checked_source(owner: str, option: Any) -> Source:
    """Return the option ``hypergradient`` of an optimizer.

    Raises:
        OptionError: It is nothing that gives a hypergradient.
    """
    if option is None or isinstance(option, Implicit):
        return option
    if isinstance(option, str):
        if option == DIRECT:
            return option
    elif callable(option) and not isinstance(option, (type, torch.nn.Module)) and not hasattr(option, "needs_path"):
        source: Source = option
        return source
    given = getattr(option, "__name__", type(option).__name__) if callable(option) else repr(option)
    raise OptionError(
        f"{owner}(hypergradient={given}): hypergradient must be hypergradient.implicit, "
        "hypergradient.Implicit(solver), a function of (upper_closure, lower_closure, x, y) that returns one tensor "
        "for each upper parameter, or 'direct'. Estimators that need the path of the lower loop run in "
        "adaptive_bilevel.methods"
    )


def matched(owner: str, upper: Sequence[Tensor], given: Any) -> list[Tensor | None]:
    """Return a hypergradient given as tensors, detached: one for each upper parameter; None for frozen ones.

    Raises:
        HypergradientError: Number or shapes differ.
    """
    listed: list[Any] = [given] if isinstance(given, Tensor) else list(given)
    fits = len(listed) == len(upper) and all(
        h is None or (isinstance(h, Tensor) and h.shape == p.shape) for p, h in zip(upper, listed, strict=False)
    )
    if not fits:
        shapes = [tuple(h.shape) if isinstance(h, Tensor) else h for h in listed]
        raise HypergradientError(
            f"{owner}: the hypergradient has shapes {shapes}, the upper parameters have "
            f"{[tuple(p.shape) for p in upper]}: give one tensor for each parameter, in their order, and None where "
            "there is none. That of a slice is written by hypergradient.assign([x[:3]], [h])"
        )
    pairs = zip(upper, listed, strict=True)
    return [None if h is None or not p.requires_grad else h.detach().to(p) for p, h in pairs]


def estimated(
    owner: str,
    source: Any,
    closure: Closure,
    problems: Sequence[LowerProblem],
    upper: list[Tensor],
    lower: Any,
    counts: Evaluations,
    group: Group,
    products: str,
) -> list[Tensor | None]:
    """Return the hypergradient that an estimator or a callable gives. A callable has a process group of its own.

    Raises:
        LowerLevelError: There is no lower level, or it is one of several levels.
    """
    if not problems:
        raise LowerLevelError(
            f"{owner}(lower=None, hypergradient=...): an estimator needs the lower level; pass lower= the lower "
            "optimizer or, at the step, lower=(tensors, loss). Where the upper closure runs the inner loop, give "
            "hypergradient='direct'"
        )
    if any(problem.answers is not None for problem in problems):
        raise LowerLevelError(
            f"{owner}(hypergradient=...): the lower level consists of several levels, which one lower loss does not "
            "describe; leave the hypergradient in .grad"
        )
    closures = [problem.closure for problem in problems]

    def total() -> Any:
        return torch.stack([torch.as_tensor(each()).reshape(()) for each in closures]).sum()

    lower_closure = closures[0] if len(closures) == 1 else total
    with torch.enable_grad():
        if not isinstance(source, Implicit):
            return matched(owner, upper, source(closure, lower_closure, upper, lower))
        h, info = implicit_with_info(
            closure, lower_closure, upper, lower, source.solver, products=products, process_group=group
        )
    counts.upper.gradients += 1
    counts.lower.gradients += info.gradients - 1
    counts.lower.hvps += info.hvps
    counts.lower.jvps += info.jvps
    return matched(owner, upper, h)


@final
class DirectLoss(Objective):
    """An upper loss that is a function of x alone: its gradient is the hypergradient, and is taken once.

    Args:
        closure: Returns the loss, a function of the upper parameters alone.
    """

    hidden: HiddenLevel | None = None
    """Looks for lower parameters in the graph of the loss."""

    def __init__(self, closure: Closure) -> None:
        self._closure = closure
        self._known: tuple[list[Tensor], list[Tensor], Evaluated] | None = None

    def __call__(self) -> Any:
        """Return the loss at the parameters as they are."""
        return self._closure()

    def begin(
        self, guard: Guard, params: list[Tensor], counts: Evaluations, random: RandomState | None = None
    ) -> list[Tensor | None]:
        """Evaluate loss and gradient where the step begins, and return the hypergradient.

        Args:
            guard: The step's guard.
            params: The upper parameters.
            counts: Where the evaluation is counted.
            random: Random state to evaluate under, if not the present one.

        Raises:
            HypergradientError: The loss has no path to the upper parameters.
        """

        def looked_at() -> Any:
            loss = self._closure()
            if self.hidden is not None:
                self.hidden.look(loss, params)
            return loss

        counts.upper.gradients += 1
        try:
            found = guard.differentiated(looked_at, params, random)
        except ClosureError as error:
            if "without a graph" in str(error):
                raise HypergradientError(_DETACHED) from error
            raise
        if all(g is None for g in found.gradients):
            raise HypergradientError(_DETACHED)
        own = found.gradients if found.own is None else found.own
        self._known = params, [p.detach().clone() for p in params], Evaluated(found.loss, own)
        return found.gradients

    def evaluated(self, tensors: Sequence[Tensor]) -> Evaluated | None:
        """Return loss and gradient, unless the parameters were moved since."""
        if self._known is None:
            return None
        params, places, found = self._known
        same = len(tensors) == len(params) and all(a is b for a, b in zip(tensors, params, strict=True))
        return found if same and all(map(torch.equal, params, places)) else None
