"""Configurations without a step size: an error before anything is bound, with the cause and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaptive_bilevel.bilevel.searching import SearchingOptimizer
from adaptive_bilevel.bilevel.upper import UpperOptimizer
from adaptive_bilevel.errors import ClosureError, OptionError, TensorError
from adaptive_bilevel.optim.polyak_step import PolyakOptimizer

from .graph import lookahead
from .hypergradient import TYPE
from .release import (
    OLD,
    RELEASE,
    BaseProblem,
    BettyEngine,
    ImplicitProblem,
    Problem,
    distribution,
    rolls_back,
    variable,
)

__all__ = ["refuse"]

IN_PARTS = ("zero", "fsdp", "accelerate")
"""Strategies that leave no process the whole of parameters and optimizer."""


def refuse(engine: BettyEngine, problems: Sequence[Problem], ours: Sequence[Problem]) -> None:
    """Raise on the first of the engine's problems that cannot be bound."""
    _refuse_own_hypergradients(engine, problems)
    if not ours:
        return
    below = {id(q): q for p in ours for q in lookahead(p)}
    involved = [p for p in problems if p in ours or id(p) in below]
    _refuse_roll_back(engine)
    _refuse_strategy(engine)
    for problem in involved:
        _refuse_kind(problem)
        _refuse_no_loss(problem)
        _refuse_frozen(problem)
    for problem in ours:
        _refuse_level(problem)
        _refuse_clipping(problem)
        _refuse_scaler(problem)
        _refuse_shared(problem)


def _named(problem: Problem) -> str:
    return f"problem {problem.name!r} ({type(problem).__name__}, {type(problem.optimizer).__name__})"


def _refuse_kind(problem: Problem) -> None:
    if not isinstance(problem, ImplicitProblem):
        raise OptionError(
            f"{_named(problem)} is no ImplicitProblem: iterative differentiation unrolls functional parameters, which "
            "no trial can put back. Make it an ImplicitProblem (type='darts', 'neumann' or 'adaptive_cg'), or keep a "
            "stock optimizer in every problem that looks ahead into it"
        )


def _refuse_no_loss(problem: Problem) -> None:
    if getattr(problem.training_step, "__func__", None) is BaseProblem.training_step:
        raise ClosureError(f"{_named(problem)} has no training_step, so no loss: define training_step(self, batch)")


def _refuse_frozen(problem: Problem) -> None:
    optimizer = problem.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"{_named(problem)} has no torch optimizer: a step above needs to know which tensors are its variable; "
            "give it one by optimizer= or configure_optimizer()"
        )
    if not any(p.requires_grad for p in variable(problem)):
        raise TensorError(
            f"{_named(problem)} is frozen: none of its parameters requires a gradient. Unfreeze some, or take the "
            "problem out of the engine's dependencies"
        )


def _refuse_level(problem: Problem) -> None:
    if lookahead(problem) and not isinstance(problem.optimizer, UpperOptimizer):
        raise OptionError(
            f"{_named(problem)} looks ahead into {[p.name for p in lookahead(problem)]}: its gradient is a "
            "hypergradient, which is not the slope of its loss at fixed lower variables. Take BiSLS or BiSPS for it"
        )


def _refuse_clipping(problem: Problem) -> None:
    if isinstance(problem.optimizer, PolyakOptimizer) and problem.gradient_clipping > 0.0:
        raise OptionError(
            f"{_named(problem)} has Config(gradient_clipping={problem.gradient_clipping}): a Polyak step divides by "
            "the squared norm of the gradient, so a clipped one makes it too long. Leave clipping out (where "
            "gradients are large the step is short anyway), or take SLS or BiSLS"
        )


def _refuse_roll_back(engine: BettyEngine) -> None:
    if OLD and rolls_back(engine):
        raise OptionError(
            f"EngineConfig(roll_back=True) on Betty {RELEASE}: it caches by reference, so nothing is rolled back and "
            "every lower problem takes two steps. Use roll_back=False, or betty-ml 0.2.1"
        )


def _refuse_own_hypergradients(engine: BettyEngine, problems: Sequence[Problem]) -> None:
    strategy = distribution(engine)
    for problem in problems:
        if problem.config.type == TYPE and strategy in IN_PARTS:
            raise OptionError(
                f"{_named(problem)} has Config(type={TYPE!r}) under EngineConfig(strategy={strategy!r}): its "
                "result would be that of each process's own part. Take type='darts', or strategy='distributed'"
            )


def _refuse_strategy(engine: BettyEngine) -> None:
    strategy = distribution(engine)
    if strategy in IN_PARTS:
        raise OptionError(
            f"EngineConfig(strategy={strategy!r}): parameters, or the optimizer, are in parts on several processes or "
            "wrapped, and a step size needs them whole. Use strategy='distributed' (or 'default')"
        )


def _refuse_scaler(problem: Problem) -> None:
    if not isinstance(problem.optimizer, SearchingOptimizer):
        return
    for involved in (problem, *lookahead(problem)):
        if involved.scaler is not None and involved.scaler.is_enabled():
            raise OptionError(
                f"{_named(involved)} trains in fp16 with a GradScaler, and {_named(problem)} differentiates its loss "
                "without one, where small gradients vanish. Use precision='bf16' (or 'fp32'), or BiSPS above"
            )


def _refuse_shared(problem: Problem) -> None:
    seen: dict[int, Problem] = {}
    for involved in (problem, *lookahead(problem)):
        names = {id(p): name for name, p in involved.module.named_parameters()}
        for p in (p for p in variable(involved) if p.requires_grad):
            other = seen.setdefault(id(p), involved)
            if other is not involved:
                name = names.get(id(p), "")
                raise TensorError(
                    f"{_named(other)} and {_named(involved)} share the parameter {name!r} of shape {tuple(p.shape)}: a "
                    "problem cannot look ahead into its own variable. Give each its own module, or a copy"
                )
