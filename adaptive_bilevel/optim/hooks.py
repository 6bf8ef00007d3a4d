"""The hooks and the profiler's record around `step`, without their cost where there are none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..errors import ClosureError, OptionError
from ..evaluation.opened import closing, spanned

__all__ = ["Hooked"]

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)

P = ParamSpec("P")
T = TypeVar("T")

_INSIDE = (
    "{0}.step was called inside the closure of a step that may move the same tensors, as a trainer's own closure does "
    "(it runs the whole training step): each trial would train. Take the lower steps before, and give the upper step a "
    "closure that only returns its loss: write\n"
    "    inner.step(lower_loss)  # Lightning: self.automatic_optimization = False, and both lines in training_step\n"
    "    outer.step(upper_loss)"
)


class Hooked(torch.optim.Optimizer):
    """An optimizer whose `step` passes torch's wrapper by, unless there is a hook or a profiler."""

    steps_uncompiled: ClassVar[bool] = False
    """Whether a step that torch.compile meets is taken as it is, outside of compiled code, instead of refused."""

    @staticmethod
    def profile_hook_step(func: Callable[P, T]) -> Callable[P, T]:
        """Wrap `step` as torch does, for hooks and profilers; without them past that wrapper.

        A record for profilers costs a fifth of an evaluation of a small model, whether or not one reads it. A step
        inside the closure of another one that may move its tensors raises a `ClosureError`.
        """
        func = closing(func)
        observed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: P.args, **kwargs: P.kwargs) -> T:
            optimizer = args[0]
            assert isinstance(optimizer, Hooked)
            if _is_compiled():
                if optimizer.steps_uncompiled:
                    outside: Callable[P, T] = torch.compiler.disable(observed if optimizer._is_observed() else func)
                    return outside(*args, **kwargs)
                raise OptionError(
                    f"{type(optimizer).__name__}.step is compiled by torch.compile: a step evaluates closures and "
                    "decides by what they return, which compiled code cannot. Compile the model (or the loss), and "
                    "leave step out, also of a compiled function around it, by torch.compiler.disable"
                )
            if spanned(p for group in optimizer.param_groups for p in group["params"]):
                raise ClosureError(_INSIDE.format(type(optimizer).__name__))
            return (observed if optimizer._is_observed() else func)(*args, **kwargs)

        return step

    def _is_observed(self) -> bool:
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_GLOBAL_HOOKS)
        return any(hooks) or torch.autograd._profiler_enabled()


def _is_compiled() -> bool:
    """Return whether this is traced by torch.compile, or runs where that compiles what it can after giving up."""
    if torch.compiler.is_compiling():
        return True
    return "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
