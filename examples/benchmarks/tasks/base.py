"""What a task is: tensors, losses, how to sample, how to evaluate, and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptive_bilevel.hypergradient import CG, Identity, Lanczos, LinearSolver, Neumann

Batch = Any
Evaluation = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """The numbers of a task, each of which the command line can override (``--set key=value``).

    Attributes:
        iterations: upper iterations (K).
        lower_steps: lower steps in each of them (T).
        upper_batch: minibatch of the upper level; 0 for full batch.
        lower_batch: minibatch of the lower level; 0 for full batch.
        fresh_lower_batches: draw a minibatch for each lower step instead of one for each upper iteration.
        lower_lr: step, or first trial, of the task's lower rule.
        solver: the inverse in the hypergradient and in the response, a name of `SOLVERS`; "default" is the package's
            own. "unroll" differentiates through the last lower step instead, and a response then has the default.
        solver_steps: Hessian-vector products that it may use.
        solver_tolerance: relative residual at which CG stops; 0 makes `solver_steps` of them whatever happens.
        solver_scale: scale of Neumann and Identity.
        evaluate_every: upper iterations between evaluations.
    """

    iterations: int
    lower_steps: int
    upper_batch: int = 0
    lower_batch: int = 0
    fresh_lower_batches: bool = False
    lower_lr: float = 1.0
    solver: str = "cg"
    solver_steps: int = 10
    solver_tolerance: float = 0.0
    solver_scale: float = 1.0
    evaluate_every: int = 10

    def make_solver(self) -> LinearSolver | None:
        """The linear solver that these settings name; None: the package's own, or not a solver's matter."""
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: choose one of {', '.join(SOLVERS)}.")
        return SOLVERS[self.solver](self)


SOLVERS: dict[str, Callable[[Settings], LinearSolver | None]] = {
    "cg": lambda s: CG(max_iterations=s.solver_steps, tolerance=s.solver_tolerance),
    "default": lambda s: None,
    "identity": lambda s: Identity(scale=s.solver_scale),
    "lanczos": lambda s: Lanczos(k=s.solver_steps),
    "neumann": lambda s: Neumann(steps=s.solver_steps, scale=s.solver_scale),
    "unroll": lambda s: None,
}


class Task(Protocol):
    """A bilevel task. The losses read the tensors of `upper` and `lower` where they are, as a user's closures do."""

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]

    def upper_loss(self, batch: Batch) -> Tensor: ...

    def lower_loss(self, batch: Batch) -> Tensor: ...

    def sample_upper(self, generator: torch.Generator) -> Batch: ...

    def sample_lower(self, generator: torch.Generator) -> Batch: ...

    def evaluate(self) -> Evaluation:
        """At the present point; "loss" is the validation loss by which methods are compared."""
        ...

    def resolve(self) -> Evaluation:
        """The same with the lower problem solved, where that can be had; made once, at the end. Else nothing."""
        ...

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The task's own lower optimizer, for methods that do not bring one."""
        ...


class SingleLevelTask(Protocol):
    """One level: `params` and a loss."""

    settings: Settings
    params: list[Tensor]

    def loss(self, batch: Batch) -> Tensor: ...

    def sample(self, generator: torch.Generator) -> Batch: ...

    def evaluate(self) -> Evaluation: ...


def append_one(x: Tensor) -> Tensor:
    """Appends a constant feature, so that one matrix holds weights and bias."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def uniform_layers(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every weight and bias uniformly from +-1/sqrt(fan_in) of its layer."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for tensor in layer.parameters():
                    tensor.uniform_(-bound, bound, generator=generator)


def draw(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A minibatch drawn with replacement; everything if `size` is 0."""
    if size == 0:
        return x, y
    index = torch.randint(len(x), (size,), generator=generator)
    return x[index], y[index]


def lenet(classes: int = 0) -> torch.nn.Sequential:
    """The layers of LeNet-5 on 28x28 images before its last one, and with `classes` that one too."""
    nn = torch.nn
    last = [nn.Linear(84, classes)] if classes else []
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), *last,
    )  # fmt: skip


def minimizer(loss: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 300) -> Tensor:
    """The minimizer of a convex function of one tensor, by L-BFGS in float64."""
    solution = start.detach().double().requires_grad_()
    search = torch.optim.LBFGS(
        [solution], max_iter=iterations, history_size=20, tolerance_grad=1e-6, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(solution)
        value.backward()
        return value

    search.step(closure)
    return solution.detach()
