"""What a bilevel task is: two lists of tensors, two losses, how to sample, how to evaluate, and its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptive_bilevel.hypergradient import CG, Identity, Neumann

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
        lower_lr: step, or first trial, of the lower rule.
        solver: "cg", "neumann" or "identity": the inverse in the hypergradient and in the response.
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
    evaluate_every: int = 25

    def make_solver(self) -> CG | Neumann | Identity:
        """The linear solver that these settings name."""
        if self.solver == "cg":
            return CG(max_iterations=self.solver_steps, tolerance=self.solver_tolerance)
        if self.solver == "neumann":
            return Neumann(steps=self.solver_steps, scale=self.solver_scale)
        if self.solver == "identity":
            return Identity(scale=self.solver_scale)
        raise ValueError(f"solver={self.solver!r}: choose 'cg', 'neumann' or 'identity'.")


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
        """At the present point; "loss" is the objective by which methods are compared."""
        ...

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The lower level's optimizer, the same for all upper methods."""
        ...


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
    """A minibatch drawn with replacement."""
    index = torch.randint(len(x), (size,), generator=generator)
    return x[index], y[index]
