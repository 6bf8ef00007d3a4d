"""What differs between the releases of Betty, in one place."""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

from torch import Tensor

from adaptive_bilevel.errors import pass_over

INSTALL = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"

try:
    import betty
    from betty.engine import Engine
    from betty.hypergradient import jvp_fn_mapping
    from betty.problems import ImplicitProblem
    from betty.problems import Problem as BaseProblem
except ImportError as error:
    raise ImportError(
        f"adaptive_bilevel_betty adapts Betty, which could not be imported ({error}): {INSTALL}"
    ) from error

__all__ = [
    "OLD",
    "RELEASE",
    "BaseProblem",
    "Engine",
    "ImplicitProblem",
    "Problem",
    "answering",
    "call_param_callback",
    "distribution",
    "jvp_fn_mapping",
    "process_gradient",
    "rolls_back",
]

pass_over("betty", "adaptive_bilevel_betty")

Problem: TypeAlias = Any
"""A problem of Betty's; Betty is not typed."""

OLD: bool = not importlib.import_module("betty.problems.problem").Problem.__dict__.get("patch_optimizer")
"""Whether this is 0.1.x: optimizers are not rebuilt, param_callback takes the parameters, roll_back is broken."""

RELEASE: str = betty.__version__


def rolls_back(engine: Any) -> bool:
    """Return whether the engine rolls lower problems back after the upper step."""
    return bool(engine.config.roll_back)


def distribution(engine: Any) -> str:
    """Return the engine's strategy; 0.1.x knows DataParallel only, which is one process."""
    return str(getattr(engine.config, "strategy", "default"))


def answering(problem: Problem) -> list[Tensor]:
    """Return the parameters of a lower problem that a hypergradient goes through; in 0.1.x, all of them."""
    return list(problem.trainable_parameters() if OLD else problem.meta_trainable_parameters())


def process_gradient(problem: Problem) -> None:
    """Do to .grad what this release does between a backward and a step."""
    if callable(getattr(problem, "grad_callback", None)):
        problem.grad_callback()
    if problem.gradient_clipping > 0.0:
        problem.clip_grad()


def call_param_callback(problem: Problem) -> None:
    """Call the user's param_callback as this release does."""
    if OLD:
        problem.param_callback(problem.trainable_parameters())
    else:
        problem.param_callback()
