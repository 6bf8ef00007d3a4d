"""Modules, lower tensors and arguments with which TorchOpt's hypergradient would be wrong: an error that names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError, OptionError, TensorError
from adaptive_bilevel.evaluation.parts import require_whole

from ._host import Module, torchopt

__all__ = [
    "IN_PARTS",
    "ONE_PROCESS",
    "attached",
    "check_lower",
    "check_module",
    "refuse_shared",
    "refuse_unregistered",
    "solution_of",
]


IN_PARTS = (
    "TorchOpt makes new tensors of parameters, which are parameters of no fully_shard module. Keep them whole, or take "
    "adaptive_bilevel's optimizers: inner = SLS(module.parameters()), BiSLS(x, lower=inner)"
)

ONE_PROCESS = (
    "{count} processes step together, and TorchOpt solves for the adjoint with the data of each alone, so the mean of "
    "its hypergradients is not that of the mean losses. Take adaptive_bilevel.hypergradient.implicit and "
    "BiSLS(x, lower=inner), whose products are means. Where problems are of this process alone, set process_group = "
    "'alone' of lower.optimizer (in solve(), after attach()) and of the UpperStep's optimizer"
)


def check_module(owner: str, module: object, *, steps: bool) -> None:
    """Reject modules whose hypergradient TorchOpt computes wrongly without saying so.

    Args:
        owner: Name for errors.
        module: An ``ImplicitMetaGradientModule``.
        steps: Whether lower steps are to be taken, which needs an objective.

    Raises:
        OptionError: It is no such module, has no objective, or has lost the ``linear_solve`` of its base class.
    """
    if not isinstance(module, torchopt.nn.ImplicitMetaGradientModule):
        raise OptionError(
            f"{owner}({type(module).__name__}): pass a torchopt.nn.ImplicitMetaGradientModule (in its __init__: self); "
            "for functions decorated by custom_root there is FunctionalLowerStep"
        )
    cls = type(module)
    if steps and not cls._custom_objective:
        raise OptionError(
            f"{owner}({cls.__name__}): the module defines optimality() and no objective(), but SLS and SPS steps "
            "compare losses: define objective() beside it, or keep your own lower loop and pass UpperStep(lower=module)"
        )
    if cls.linear_solve is None:
        for base in cls.__mro__[1:]:
            if getattr(base, "linear_solve", None) is not None:
                raise OptionError(
                    f"{owner}({cls.__name__}): TorchOpt does not inherit linear_solve, so {cls.__name__} has lost that "
                    f"of {base.__name__} and is solved by solve_normal_cg(). Write class {cls.__name__}("
                    f"{base.__name__}, linear_solve=...), or hold a module instead of deriving from it"
                )


def check_lower(owner: str, params: Sequence[Tensor]) -> None:
    """Reject lower parameters that TorchOpt differentiates wrongly.

    Raises:
        TensorError: There is none, one is frozen, in parts, or has no dimension.
    """
    require_whole(owner, params, IN_PARTS)
    if not params:
        raise TensorError(f"{owner}: the module has no lower parameters; register them as nn.Parameter")
    for index, p in enumerate(params):
        if p.dim() == 0:
            raise TensorError(
                f"{owner}: lower parameter {index} has no dimension, for which TorchOpt returns a zero hypergradient "
                "without saying so (metaopt/torchopt#222); give it the shape (1,)"
            )
        if p.is_leaf and not p.requires_grad:
            raise TensorError(
                f"{owner}: lower parameter {index} of shape {tuple(p.shape)} is frozen, but TorchOpt differentiates "
                "all of parameters() as if they were solved for; register it as a buffer"
            )


def refuse_unregistered(xs: Sequence[Tensor], registered: Sequence[Tensor], losses: Callable[[], Tensor]) -> None:
    """Reject upper parameters that the lower loss depends on and TorchOpt does not know of.

    Args:
        xs: The upper parameters.
        registered: Those that TorchOpt differentiates by.
        losses: Returns the lower loss with its graph.

    Raises:
        HypergradientError: There is such a parameter: its hypergradient would lack the implicit part.
    """
    known = {id(p) for p in registered}
    unknown = [x for x in xs if id(x) not in known and x.requires_grad]
    if not unknown:
        return
    with torch.enable_grad():
        loss = losses()
        try:
            found = torch.autograd.grad(loss, unknown, allow_unused=True) if loss.requires_grad else ()
            shapes = [tuple(x.shape) for x, g in zip(unknown, found, strict=False) if g is not None]
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            shapes = [tuple(x.shape) for x in unknown]  # the loss reads what was computed from them before the loop
    if shapes:
        raise HypergradientError(
            f"UpperStep: the lower objective depends on upper parameters of shapes {shapes} that TorchOpt does not "
            "differentiate by. Pass them (or their module, in train mode) to the constructor of the implicit module "
            "and assign them to an attribute; with custom_root, pass them as an argument that argnums names, and "
            "compute from them in the objective only"
        )


def refuse_shared(upper: Sequence[Tensor], lower: Sequence[Tensor]) -> None:
    """Reject upper parameters that the module takes for lower ones.

    Raises:
        TensorError: There is such a parameter.
    """
    known = {id(x) for x in upper}
    shapes = [tuple(p.shape) for p in lower if id(p) in known]
    if shapes:
        raise TensorError(
            f"UpperStep: upper parameters of shapes {shapes} are lower parameters of the module. A network that is in "
            "eval mode when it is passed to an implicit module is taken for lower parameters (metaopt/torchopt#144): "
            "call .train() on it before, or pass tensors that require gradients"
        )


def solution_of(module: Module, given: object) -> list[Tensor]:
    """Return the parameters of a solved module.

    Args:
        module: The module.
        given: What the upper step was given as the solution: nothing, since the module holds it.

    Raises:
        OptionError: A solution was given.
        HypergradientError: The parameters are not the outcome of a differentiable solve().
    """
    if given is not None:
        raise OptionError(
            f"UpperStep.step(solution=...): got a {type(given).__name__}, but a module holds its own solution; "
            "leave it out, it is for functional solvers"
        )
    params: list[Tensor] = list(module.parameters())
    attached("UpperStep", params)
    return params


def attached(owner: str, params: Sequence[Tensor]) -> None:
    """Reject parameters that are not the outcome of a differentiable solve()."""
    if any(p.grad_fn is None for p in params):
        raise HypergradientError(
            f"{owner}: the lower parameters do not come from a solve() since the last upper step, so TorchOpt has no "
            "graph for the hypergradient. Call solve() with gradients enabled right before step()"
        )
