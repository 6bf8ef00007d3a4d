"""Problems for Betty with known solutions, on both of its releases, and engines around them."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from adaptive_bilevel_betty.release import OLD
from examples.betty_ridge import Batches, Data
from tests.optim.helpers import plain

logging.getLogger("betty").disabled = True

only_new = pytest.mark.skipif(OLD, reason="Betty 0.1.x does not offer this")
only_old = pytest.mark.skipif(not OLD, reason="of Betty 0.1.x")

Loss = Callable[..., Any]

ANY: dict[str, Any] = {"slack": 1e12, "reset": "initial"}
"""Options of searches that always take one step: whatever is tried is taken, or the bound is."""


class Variable(nn.Module):
    """A module that is one tensor."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.detach().clone())

    def forward(self) -> Tensor:
        return self.value


class Level(ImplicitProblem):
    """A problem from a function: ``loss(problem, batch)``; other problems are the problem's attributes, by name."""

    def __init__(
        self, name: str, loss: Loss, module: nn.Module, optimizer: Any, data: Any = None, **config: Any
    ) -> None:
        scheduler = config.pop("scheduler", None)
        super().__init__(name=name, config=Config(**config), scheduler=scheduler)
        self._loss, self._start, self._optimizer, self._data = loss, module, optimizer, data
        self.losses: list[float] = []
        self.evaluations = 0

    def configure_module(self) -> nn.Module:
        return self._start

    def configure_optimizer(self) -> Any:
        return self._optimizer(self._start.parameters())

    def configure_train_data_loader(self) -> Any:
        return [(torch.zeros(1),)] if self._data is None else self._data

    def training_step(self, batch: Any) -> Any:
        loss = self._loss(self, batch)
        self.evaluations += 1
        if not getattr(self, "in_trial", False):
            self.losses.append((loss["loss"] if isinstance(loss, dict) else loss).item())
        return loss

    @property
    def value(self) -> Tensor:
        """The tensor of a `Variable`."""
        found: Tensor = next(iter(self.module.parameters()))
        return found.detach()


def engine(
    *levels: Level,
    edges: Sequence[tuple[Level, Level]] | None = None,
    ahead: Sequence[tuple[Level, Level]] | None = None,
    steps: int = 1,
    kind: Any = Engine,
    **config: Any,
) -> Any:
    """An engine of levels, lowest first; `edges` are (lower, upper), `ahead` (upper, lower), by default the chain."""
    edges = edges if edges is not None else list(itertools.pairwise(levels))
    ahead = ahead if ahead is not None else [(a, b) for b, a in edges]
    l2u: dict[Any, list[Any]] = {}
    u2l: dict[Any, list[Any]] = {}
    for lower, upper in edges:
        l2u.setdefault(lower, []).append(upper)
    for upper, lower in ahead:
        u2l.setdefault(upper, []).append(lower)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Betty uses torch.cuda.amp of old
        return kind(
            config=EngineConfig(train_iters=steps, **config),
            problems=list(levels),
            dependencies={"l2u": l2u, "u2l": u2l},
        )


def sgd(lr: float, **options: Any) -> Callable[[Any], Any]:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def gradients_of_steps(level: Level) -> list[Tensor]:
    """A list that gets the gradient of a `Variable` whenever its optimizer is stepped."""
    seen: list[Tensor] = []
    step = level.optimizer.step

    def spy() -> Any:
        seen.append(level.module.value.grad.clone())
        return step()

    level.optimizer.step = spy
    return seen


def state(made: Any) -> str:
    """All that a run leaves: parameters, buffers, gradients and random state; NaN equals itself there."""
    modules = [problem.module.state_dict() for problem in made.problems]
    return repr(plain([modules, torch.get_rng_state()]))


class Ridge(Data):
    """Ridge regression with one regulariser exp(x_j) per feature; y is the regression, x the regularisers.

    g = |A y - b|^2 / (2 n) + sum_j exp(x_j) y_j^2 / 2 and f = |A_v y - b_v|^2 / (2 m).
    """

    def upper_loss(self, problem: Any, batch: Any) -> Tensor:
        A, b = batch
        return 0.5 * (A @ problem.inner() - b).square().mean()

    def lower_loss(self, problem: Any, batch: Any) -> Tensor:
        A, b = batch
        y = problem.module()
        return 0.5 * (A @ y - b).square().mean() + 0.5 * (problem.outer().exp() * y.square()).sum()

    def levels(
        self,
        outer: Any,
        inner: Any,
        *,
        batch: int | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        T: int = 10,
        solved: bool = False,
        **lower: Any,
    ) -> tuple[Level, Level]:
        """The two problems; `batch` is that of the lower one, drawn anew in each step."""
        x = torch.zeros(self.d) if x is None else x
        y = self.solve(x) if solved else torch.zeros(self.d) if y is None else y
        data: Any = [(self.A, self.b)]
        if batch is not None:
            data = Batches(self.A, self.b, batch)
        top = Level("outer", self.upper_loss, Variable(x), outer, [(self.Av, self.bv)])
        low = Level("inner", self.lower_loss, Variable(y), inner, data, unroll_steps=T, **lower)
        return top, low
