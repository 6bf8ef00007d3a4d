"""The lower level of an upper step: its problems, and how a predicted response is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ClosureError, LowerLevelError, OptionError, TensorError
from ..evaluation import foreach
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.objective import Replay
from ..evaluation.reductions import on_host
from ..evaluation.tensors import refuse_unsupported
from ..evaluation.vectors import inner
from ..optim.base import AdaptiveOptimizer
from ..optim.unwrap import unwrapped

__all__ = ["Lower", "LowerLevel", "LowerProblem", "as_lower", "refuse_shared", "stability_limit"]


class LowerProblem(NamedTuple):
    """One lower problem: a variable and the loss that it minimizes.

    Attributes:
        tensors: The variable y_j.
        closure: Returns its loss g_j.
        random: Random state at which the loss is evaluated again; None for the present state.
        step_size: The last step size of y_j.
        answers: The variables that y_j depends on, in a level of several problems: indices of earlier problems in the
            list, and -1 for x. If None, the sum of all losses is one lower loss.
    """

    tensors: Sequence[Tensor]
    closure: Closure
    random: RandomState | None = None
    step_size: float = 0.0
    answers: Sequence[int] | None = None


class Lower(Protocol):
    """A lower level. Hosts implement it if its variables are not in torch optimizers.

    An upper optimizer takes such an object as ``lower=``.

    Attributes:
        limit: The largest eigenvalue of the lower Hessian at which lower steps do not diverge: infinite if they are
            searched or adapted, None if it is not known.
    """

    @property
    def limit(self) -> float | None:
        """The largest eigenvalue at which lower steps do not diverge; None: not known."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the lower variable: every trainable tensor, once."""
        ...

    def problems(self, closures: Any, guard: Guard) -> list[LowerProblem]:
        """Return the lower problems on the sample of the upper step.

        Args:
            closures: The argument ``lower_closure`` of the upper step.
            guard: The step's guard.
        """
        ...

    def upper_moved(self) -> None:
        """Take note that an upper step has moved x, and mostly y with it."""
        ...

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        """Move the lower variable by step * response."""
        ...

    def restart(self) -> None:
        """Clear the state of stock optimizers that does not fit an earlier point, to which y has gone back."""
        ...


class LowerLevel:
    """A lower level of one or several torch optimizers. The lower loss is the sum of their losses.

    Args:
        optimizers: The lower optimizers, or what trainers have wrapped around them.

    Raises:
        OptionError: One is no torch optimizer.
        TensorError: A tensor is of a kind that cannot be stepped.

    >>> import torch
    >>> from adaptive_bilevel import SLS
    >>> y = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> LowerLevel([SLS([y])]).tensors()
    [tensor([1., 2.], requires_grad=True)]
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = [unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in self.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise OptionError(
                    f"lower={type(optimizer).__name__}: lower must be the optimizer of the lower level (any "
                    "torch.optim.Optimizer), a list of them, or None. The tensors of functional code are given to the "
                    "step, as lower=(tensors, loss)"
                )
        for p in self.tensors():
            refuse_unsupported("the lower level", p)

    def __bool__(self) -> bool:
        """Return whether there is a lower level."""
        return bool(self.optimizers)

    def tensors(self) -> list[Tensor]:
        """Return the lower variable: every trainable parameter of the lower optimizers, once."""
        found = {id(p): p for optimizer in self.optimizers for p in _parameters(optimizer) if p.requires_grad}
        return list(found.values())

    def problems(self, closures: Any, guard: Guard) -> list[LowerProblem]:
        """Return a problem for each optimizer, on its last sample or on that of the given closure."""
        given = [None] * len(self.optimizers)
        if closures is not None:
            given = list(closures) if isinstance(closures, (list, tuple)) else [closures]
            if len(given) != len(self.optimizers):
                raise LowerLevelError(
                    f"lower_closure has {len(given)} closures for {len(self.optimizers)} lower optimizers: pass one "
                    "for each, in the same order"
                )
            for closure in given:
                if not (closure is None or callable(closure)):
                    raise ClosureError(
                        f"step(lower_closure={closure!r}): pass a function that returns the lower loss, e.g. "
                        "lower_closure=lambda: lower_loss(x, y), or a list of them"
                    )
        found = []
        for optimizer, closure in zip(self.optimizers, given, strict=True):
            sample = _sample(optimizer, closure, guard)
            tensors = [p for p in _parameters(optimizer) if p.requires_grad]
            found.append(LowerProblem(tensors, sample.closure, sample.random, sample.step_size))
        return found

    def restart(self) -> None:
        """Clear the momentum buffer of `torch.optim.SGD`, and of other stock optimizers what is not finite."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdaptiveOptimizer):
                continue
            for parameter, state in list(optimizer.state.items()):
                if isinstance(optimizer, torch.optim.SGD) or not _is_finite(state):
                    del optimizer.state[parameter]

    @property
    def limit(self) -> float | None:
        """The least `stability_limit` of the optimizers."""
        return min(map(stability_limit, self.optimizers), default=math.inf)

    @property
    def closures(self) -> list[Closure | None]:
        """The closures of the last steps, as far as the optimizers remember them."""
        samples = [o.sample if isinstance(o, AdaptiveOptimizer) else None for o in self.optimizers]
        return [None if sample is None else sample.closure for sample in samples]

    def upper_moved(self) -> None:
        """Tell the optimizers of this package, see `AdaptiveOptimizer.upper_moved`."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdaptiveOptimizer):
                optimizer.upper_moved()

    def carry(self, response: Sequence[Tensor], step: float) -> None:
        """Move the lower variable by step * response."""
        foreach.add_(self.tensors(), response, alpha=step)
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdaptiveOptimizer):
                optimizer.displaced()


def stability_limit(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest curvature at which steps do not diverge, 2 (1 + momentum) / lr of `torch.optim.SGD`.

    It is infinite for others, whose steps are searched or adapted.

    >>> stability_limit(torch.optim.SGD([torch.ones(1)], lr=0.5, momentum=0.5))
    6.0
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return math.inf
    groups = [(float(group["lr"]), float(group["momentum"])) for group in optimizer.param_groups]
    return min(2.0 * (1.0 + momentum) / lr if lr > 0.0 else math.inf for lr, momentum in groups)


def as_lower(lower: Any) -> Lower:
    """Return the option ``lower`` of an upper optimizer as a lower level; None gives an empty one."""
    if not isinstance(lower, type) and callable(getattr(lower, "problems", None)):
        level: Lower = lower
        return level
    if lower is None:
        return LowerLevel([])
    return LowerLevel(lower if isinstance(lower, (list, tuple)) else [lower])


def refuse_shared(lower: Lower, upper: Sequence[Tensor]) -> None:
    """Raise if an upper parameter is a lower one, too."""
    # Of optimizers, the frozen parameters too: they may be trained later.
    listed = [p for o in lower.optimizers for p in _parameters(o)] if isinstance(lower, LowerLevel) else lower.tensors()
    own = {id(p) for p in listed}
    shapes = [tuple(p.shape) for p in upper if id(p) in own]
    if shapes:
        raise TensorError(
            f"the upper and the lower level share tensors of shapes {shapes}: each tensor belongs to one level; "
            "give the lower optimizer its own parameters only"
        )


def _is_finite(state: dict[str, Any]) -> bool:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    (size,) = on_host(inner(tensors, tensors))
    return math.isfinite(size)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _sample(optimizer: torch.optim.Optimizer, closure: Closure | None, guard: Guard) -> Replay:
    remembered = optimizer.sample if isinstance(optimizer, AdaptiveOptimizer) else None
    if closure is not None:
        step = remembered.step_size if remembered is not None else float(optimizer.param_groups[0]["lr"])
        return Replay(closure, guard.random_state(), step)
    if remembered is None:
        remedy = (
            "take lower steps with a closure first, or pass step(..., lower_closure=...)"
            if isinstance(optimizer, AdaptiveOptimizer)
            else "it remembers no closure, so pass step(..., lower_closure=lambda: lower_loss)"
        )
        raise LowerLevelError(f"the lower optimizer {type(optimizer).__name__} has no sample to evaluate: {remedy}")
    return remembered
