"""BiSPS and BiSLS as optimizers of problems that look ahead into others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adaptive_bilevel import bilevel
from adaptive_bilevel.bilevel.model_check import Belief
from adaptive_bilevel.bilevel.response import Response
from adaptive_bilevel.errors import LowerLevelError, OptionError
from adaptive_bilevel.evaluation.guard import Guard
from adaptive_bilevel.hypergradient import LinearSolver
from adaptive_bilevel.optim.polyak import PolyakOptimizer
from adaptive_bilevel.optim.search_path import Move
from adaptive_bilevel.policies import Record

from ._options import solver_from, solver_text
from .chain import Block, ChainResponse
from .hypergradient import TYPE
from .nested import total_loss
from .optimizers import Hosted
from .seat import Seat, edges, seat_of

__all__ = ["BiSLS", "BiSPS"]


class BiSPS(Hosted, bilevel.BiSPS):  # type: ignore[misc]  # step takes what Betty knows
    """`adaptive_bilevel.BiSPS` as a problem's optimizer: the same options but `lower`, which `bind` sets."""

    def __init__(self, params: ParamsT, lr: float | None = None, **options: Any) -> None:
        _refuse("BiSPS", options)
        super().__init__(params, lr, **options)

    def sit(self, seat: Seat) -> None:
        """Take the place that `bind` gives; the bound beta_b,k of lower Polyak rules decays with this one's steps."""
        super().sit(seat)
        self.bind([p.optimizer for p in _clocked(seat)])

    def _take(self, step: Any, seat: Seat) -> Any:
        return step(self, loss=seat.replay.loss)


@dataclass(frozen=True)
class _Written:
    """The solver as plain text; None: it cannot be written so."""

    solver: str | None


class BiSLS(Hosted, bilevel.BiSLS):  # type: ignore[misc]  # step takes what Betty knows
    """`adaptive_bilevel.BiSLS` as a problem's optimizer: the same options but `lower`, `project` and `solver`.

    The lower level is what the problem's paths say, and is set by `bind`. A ``param_callback`` of the problem takes the
    place of `project`. The solver is CG, Neumann or Identity, or the same written as a string, since Betty builds
    optimizers anew from plain values.
    """

    def __init__(
        self, params: ParamsT, lr: float | None = None, *, solver: LinearSolver | str | None = None, **options: Any
    ) -> None:
        _refuse("BiSLS", options)
        super().__init__(params, lr, solver=solver_from(solver), **options)
        self.solver = self._solver  # once more, now that there are options to write it into

    @property
    def solver(self) -> LinearSolver:
        """P of the tangent. One that cannot be written as plain values is not saved, and stays when others load."""
        return self._solver

    @solver.setter
    def solver(self, solver: LinearSolver) -> None:
        self._solver = solver
        if "_records" in self.__dict__:
            self.written = _Written(solver=solver_text(solver))
            self._records = {**self._records, "written": self.written}
            for options in (self.defaults, *self.param_groups):
                options["solver"] = self.written.solver

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a solver that was saved is the solver."""
        if "solver" in state:
            state = {**state, "_solver": state["solver"]}
            del state["solver"]
        super().__setstate__(state)
        saved = self.written.solver
        self.solver = self._solver if saved is None or saved == solver_text(self._solver) else solver_from(saved)

    def _take(self, step: Any, seat: Seat) -> Any:
        below = seat.below()
        optimizers = [s.problem.optimizer for s in below]
        if [id(o) for o in self.lower.optimizers] != [id(o) for o in optimizers]:
            self.bind(optimizers)
        self.project = seat.project if seat.projects else None
        try:
            return step(self, seat.replay.closure, [_lower_closure(s) for s in below] or None)
        finally:
            self.project = None  # it is the problem's, and a copy of this optimizer is not the problem's

    def _respond(
        self,
        guard: Guard,
        lower_closure: Any,
        lower: list[Tensor],
        partials: tuple[list[Tensor], list[Tensor]],
        going: Move,
        belief: Belief,
    ) -> Response:
        """Return the response of one problem, or of several, of which some may answer to others."""
        seat = self._seat
        if not self._hosted or seat is None or self.parts.response == "step" or len(self.lower.optimizers) < 2:
            return super()._respond(guard, lower_closure, lower, partials, going, belief)
        response = ChainResponse(
            guard,
            _blocks(seat),
            going.tensors,
            lower,
            partials,
            self.solver,
            belief,
            self.evaluations.lower,
        )
        response.along(going.along)
        return response

    def _processed(self, active: Sequence[Tensor], hypergradient: list[Tensor]) -> list[Tensor]:
        """Return it after the problem's grad_callback and clipping."""
        if not self._hosted or self._seat is None:
            return hypergradient
        changed = self._seat.processed(active, hypergradient)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(active, changed, strict=True)]

    def _carry(self, lower: list[Tensor], answer: list[Tensor] | None, step: float) -> None:
        """Take the prediction along, unless the engine takes lower steps back anyway."""
        seat = self._seat if self._hosted else None
        if seat is not None and seat.rolled_back:
            return
        super()._carry(lower, answer, step)
        if seat is not None and self.parts.carry is True:
            for below in (below for below in seat.below() if below.projects):
                below.project([p for group in below.problem.optimizer.param_groups for p in group["params"]])

    def _compare_slopes(self, record: Record) -> None:
        """Compare, unless the hypergradient was clipped: then it is shorter than what the slope is of."""
        if not (self._hosted and self._seat is not None and self._seat.problem.gradient_clipping > 0.0):
            super()._compare_slopes(record)


def _refuse(owner: str, options: dict[str, Any]) -> None:
    if "lower" in options:
        raise OptionError(f"{owner}(lower=...): bind(engine) sets the lower level from the engine's dependencies")
    if "project" in options:
        raise OptionError(
            f"{owner}(project=...): Betty projects by param_callback of the problem; it is used in trials"
        )


def _clocked(seat: Seat) -> list[Any]:
    """Return the problems below whose Polyak bound this one's steps count for: each has one clock, its first parent."""
    mine = []
    for below in seat.below():
        above = [p for p in seat.replay.problems if isinstance(p.optimizer, BiSPS) and below.problem in edges(p)]
        if isinstance(below.problem.optimizer, PolyakOptimizer) and above[0] is seat.problem:
            mine.append(below.problem)
    return mine


def _lower_closure(seat: Seat) -> Any:
    """Return the loss whose minimizer is followed; problems further below answer if they do in the hypergradient."""
    if seat.problem.config.type != TYPE or not seat.problem.paths:
        return seat.replay.closure
    return lambda: total_loss(seat) if torch.is_grad_enabled() else seat.replay.closure()


def _blocks(seat: Seat) -> list[Block]:
    answers = edges(seat.problem)
    places = {seat.problem: -1, **{problem: i for i, problem in enumerate(answers)}}
    blocks = []
    for problem, uppers in answers.items():
        tensors = [p for g in problem.optimizer.param_groups for p in g["params"] if p.requires_grad]
        if not tensors:
            raise LowerLevelError(f"problem {problem.name!r} is frozen: take it out of the engine's dependencies")
        blocks.append(Block(_lower_closure(seat_of(problem)), tensors, [places[upper] for upper in uppers]))
    return blocks
