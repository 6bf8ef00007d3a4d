"""BiSPS, BiSLS and OneStepBiSLS as optimizers of upper problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch.optim.optimizer import ParamsT

import adaptive_bilevel as core
from adaptive_bilevel.bilevel import OneStepSearch, UpperPolyak, UpperSearch
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import LinearSolver

from .optimizers import UNBOUND, records_of
from .solver_text import SolverOption, solver_from

__all__ = ["BiSLS", "BiSPS", "OneStepBiSLS"]


@final
class BiSPS(UpperPolyak):
    """`adaptive_bilevel.BiSPS` as a problem's optimizer. The options are the same, without `lower`: `bind` sets it."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        _refuse("BiSPS", options)
        super().__init__(params, lr, **records_of(core.BiSPS, lr, options))
        self.bind(None)


@final
class BiSLS(UpperSearch):
    """`adaptive_bilevel.BiSLS` as a problem's optimizer, without the options `lower`, `project` and `search`.

    `bind` sets the lower level from the problem's paths. A ``param_callback`` of the problem replaces `project`. The
    solver is Lanczos, CG, Neumann or Identity, or the same as a string, because Betty rebuilds optimizers from plain
    values.

    Attributes:
        inverse: The record of the solver.
    """

    unbound = UNBOUND
    inverse: SolverOption

    def __init__(
        self, params: ParamsT, lr: float | None = None, *, solver: LinearSolver | str | None = None, **options: object
    ) -> None:
        _refuse("BiSLS", options)
        inverse = SolverOption.of(solver_from(solver))
        super().__init__(params, lr, inverse=inverse, **records_of(core.BiSLS, lr, options))
        self.bind(None)

    @property
    def solver(self) -> LinearSolver:
        """P of the tangent. One that cannot be written as plain values is not saved, and stays when others load."""
        return self.inverse.used

    @solver.setter
    def solver(self, solver: LinearSolver) -> None:
        self.set_record("inverse", SolverOption.of(solver))


@final
class OneStepBiSLS(OneStepSearch):
    """`adaptive_bilevel.OneStepBiSLS` as a problem's optimizer, without the options `lower` and `project`."""

    unbound = UNBOUND

    def __init__(self, params: ParamsT, lr: float | None = None, **options: object) -> None:
        _refuse("OneStepBiSLS", options)
        super().__init__(params, lr, **records_of(core.OneStepBiSLS, lr, options))
        self.bind(None)


def _refuse(owner: str, options: Mapping[str, object]) -> None:
    if "lower" in options:
        raise OptionError(f"{owner}(lower=...): bind(engine) sets the lower level from the engine's dependencies")
    if "project" in options:
        raise OptionError(
            f"{owner}(project=...): Betty projects by param_callback of the problem; it is used in trials"
        )
    if "search" in options:
        raise OptionError(f"{owner}(search=...): Betty builds optimizers anew from plain values; give c, shrink, ...")
