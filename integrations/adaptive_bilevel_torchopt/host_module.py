"""What TorchOpt's implicit modules need to be kept right: refusals, and a backward that sees what the forward saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_bilevel.errors import HypergradientError, OptionError, TensorError
from adaptive_bilevel.optim.guard import RandomState
from adaptive_bilevel.optim.scalars import inner

from ._host import torchopt

__all__ = ["as_differentiated", "check_lower", "check_module", "fingerprint", "refuse_unregistered", "same"]

_NORMS = nn.modules.batchnorm._BatchNorm


def check_module(owner: str, module: Any, *, steps: bool) -> None:
    """Refuse modules whose hypergradient TorchOpt computes wrongly without saying so.

    Args:
        owner: Who asks, for errors.
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
    """Refuse lower parameters that TorchOpt differentiates wrongly.

    Raises:
        TensorError: There is none, one is frozen, or one has no dimension.
    """
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


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Return ||tensors||^2: it tells whether somebody changed them, in whichever way (versions do not count .data)."""
    detached = [t.detach() for t in tensors]
    return inner(detached, detached)


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two fingerprints are equal, NaN being equal to itself."""
    return bool((left == right) | ((left != left) & (right != right)))


@contextlib.contextmanager
def as_differentiated(module: Any, random: RandomState | None) -> Iterator[None]:
    """While TorchOpt's backward evaluates the module again, let it see what the last lower step saw.

    Its objective draws the dropout masks of that step (and leaves the random state alone), and BatchNorm in train mode
    leaves its running statistics alone, which no derivative depends on and TorchOpt's transforms refuse to change.
    """
    name = "optimality" if type(module)._custom_optimality else "objective"
    original: Callable[..., Any] = getattr(module, name)
    devices = sorted({p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}, key=str)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        assert random is not None
        present = RandomState(devices)
        random.restore()
        try:
            return original(*args, **kwargs)
        finally:
            present.restore()

    norms = [m for m in _modules(module) if isinstance(m, _NORMS) and m.training and m.track_running_stats]
    shadowed = module.__dict__.get(name)
    try:
        for norm in norms:
            norm.track_running_stats = False
        if random is not None:
            module.__dict__[name] = replayed
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        if shadowed is not None:
            module.__dict__[name] = shadowed
        else:
            module.__dict__.pop(name, None)


def _modules(module: Any) -> list[nn.Module]:
    found = {id(part): part for part in module.modules()}
    for child in module.meta_children():
        found.update({id(part): part for part in child.modules()})
    return list(found.values())


def refuse_unregistered(xs: Sequence[Tensor], registered: Sequence[Tensor], losses: Callable[[], Tensor]) -> None:
    """Refuse upper parameters that the lower loss depends on and TorchOpt does not know of.

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
        found = torch.autograd.grad(loss, unknown, allow_unused=True) if loss.requires_grad else ()
    shapes = [tuple(x.shape) for x, g in zip(unknown, found, strict=False) if g is not None]
    if shapes:
        raise HypergradientError(
            f"UpperStep: the lower objective depends on upper parameters of shapes {shapes} that TorchOpt does not "
            "differentiate by. Pass them (or their module, in train mode) to the constructor of the implicit module "
            "and assign them to an attribute; with custom_root, pass them as an argument that argnums names"
        )
