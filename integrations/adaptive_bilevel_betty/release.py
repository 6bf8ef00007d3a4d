"""What differs between the releases of Betty, in one place, and what is used of its problems."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

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
    "BettyEngine",
    "Engine",
    "ImplicitProblem",
    "Problem",
    "Report",
    "answering",
    "call_param_callback",
    "distribution",
    "jvp_fn_mapping",
    "process_gradient",
    "rolls_back",
    "variable",
]

pass_over("betty", "adaptive_bilevel_betty")

OLD: bool = not importlib.import_module("betty.problems.problem").Problem.__dict__.get("patch_optimizer")
"""Whether this is 0.1.x: optimizers are not rebuilt, param_callback takes the parameters, roll_back is broken."""

RELEASE: str = betty.__version__

Report = dict[str, object]
"""What a problem logs of a step."""


class ProblemConfig(Protocol):
    """What is used of a problem's config."""

    type: str


class EngineConfig(Protocol):
    """What is used of an engine's config."""

    roll_back: bool


class BettyEngine(Protocol):
    """What is used of an engine of Betty's, which is not typed."""

    config: EngineConfig
    problems: Sequence[Problem]


class Problem(Protocol):
    """What is used of a problem of Betty's, which is not typed.

    Attributes:
        paths: Chains of problems that it differentiates along.
        count: How often its loss was evaluated.
        gas: How many evaluations a step has.
        in_trial: Whether a loss is evaluated again; `bind` sets it.
    """

    name: str
    config: ProblemConfig
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    paths: Sequence[Sequence[Problem]]
    count: int
    gas: int
    gradient_clipping: float
    in_trial: bool
    get_loss: Callable[[object], tuple[Tensor, Report]]
    get_batch: Callable[..., object]
    one_step_descent: Callable[..., object]
    grad_callback: Callable[[], object]
    param_callback: Callable[..., object]
    trainable_parameters: Callable[[], Iterable[Tensor]]
    meta_trainable_parameters: Callable[[], Iterable[Tensor]]
    clip_grad: Callable[[], object]
    set_grads: Callable[[Sequence[Tensor], Sequence[Tensor]], object]
    training_step: Callable[[object], object]


def rolls_back(engine: BettyEngine) -> bool:
    """Return whether the engine rolls lower problems back after the upper step."""
    return bool(engine.config.roll_back)


def distribution(engine: BettyEngine) -> str:
    """Return the engine's strategy; 0.1.x knows DataParallel only, which is one process."""
    return str(getattr(engine.config, "strategy", "default"))


def answering(problem: Problem) -> list[Tensor]:
    """Return the parameters of a lower problem that a hypergradient goes through; in 0.1.x, all of them."""
    return list(problem.trainable_parameters() if OLD else problem.meta_trainable_parameters())


def variable(problem: Problem) -> list[Tensor]:
    """Return all parameters of the problem's optimizer, in order."""
    return [p for group in problem.optimizer.param_groups for p in group["params"]]


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
