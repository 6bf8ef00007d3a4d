"""What an upper step needs of a lower level, whichever way it is solved."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence

from torch import Tensor

from adaptive_bilevel.hypergradient import LinearSolver

from ._host import Module
from .task import SolvedProblem

__all__ = ["SolvedLevel"]


class SolvedLevel(abc.ABC):
    """The lower level of an upper step: one lower problem, or several that one solver serves.

    Attributes:
        module: The module that is solved; None for a function that `custom_root` decorates.
    """

    module: Module | None

    @abc.abstractmethod
    def solved(self, solution: object) -> list[SolvedProblem]:
        """Return the lower problems, each attached to TorchOpt's graph, after all checks.

        Args:
            solution: What a functional solver returned, as passed to the upper step.
        """

    @abc.abstractmethod
    def backward(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for TorchOpt's backward."""

    @abc.abstractmethod
    def registered(self, problems: Sequence[SolvedProblem]) -> list[Tensor]:
        """Return the upper tensors that TorchOpt differentiates by.

        Args:
            problems: This level's, with their graph.
        """

    @abc.abstractmethod
    def solver(self) -> LinearSolver:
        """Return the solver of the declared kind."""

    @abc.abstractmethod
    def follow(self) -> None:
        """Let bounds decay with the upper iterations, and be constant within one: beta_b,k of eq. (11)."""

    @abc.abstractmethod
    def done(self) -> None:
        """Let go of what belongs to this upper step, after it was taken."""
